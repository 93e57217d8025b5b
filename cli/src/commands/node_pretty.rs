//! A node for people. Source: docker/cli `node/formatter.go`, `nodeInspectPrettyTemplate`.

use std::fmt::Write as _;

use skep_common::Node;

use crate::format::human::{bytes_binary, capitalize};

/// The text of `inspect --pretty`.
pub(super) fn pretty(node: &Node) -> String {
    let mut out = String::new();
    let mut line = |text: std::fmt::Arguments<'_>| {
        // Writing to a String does not fail.
        let _ = writeln!(out, "{text}");
    };
    line(format_args!("ID:\t\t\t{}", node.id));
    if let Some(name) = &node.spec.name {
        line(format_args!("Name:\t\t\t{name}"));
    }
    let labels = |labels: &std::collections::BTreeMap<String, String>| {
        let separator = |value: &str| if value.is_empty() { "" } else { "=" };
        labels
            .iter()
            .map(|(name, value)| format!(" - {name}{}{value}\n", separator(value)))
            .collect::<String>()
    };
    if let Some(given) = node.spec.labels.as_ref().filter(|given| !given.is_empty()) {
        line(format_args!("Labels:\n{}", labels(given).trim_end()));
    }
    let description = node.description.clone().unwrap_or_default();
    line(format_args!("Hostname:              \t{}", description.hostname));
    line(format_args!("Joined at:             \t{}", node.meta.created_at));
    line(format_args!("Status:\n State:\t\t\t{}", capitalize(node.status.state.name())));
    if !node.status.message.is_empty() {
        line(format_args!(" Message:              \t{}", capitalize(&node.status.message)));
    }
    line(format_args!(" Availability:         \t{}", capitalize(node.spec.availability.name())));
    if !node.status.addr.is_empty() {
        line(format_args!(" Address:\t\t{}", node.status.addr));
    }
    if let Some(manager) = &node.manager_status {
        line(format_args!("Manager Status:\n Address:\t\t{}", manager.addr));
        line(format_args!(" Raft Status:\t\t{}", capitalize(&manager.reachability)));
        line(format_args!(" Leader:\t\t{}", if manager.leader { "Yes" } else { "No" }));
    }
    line(format_args!("Platform:\n Operating System:\t{}", description.platform.os));
    line(format_args!(" Architecture:\t\t{}", description.platform.architecture));
    let cpus = description.resources.nano_cpus.unwrap_or_default() / 1_000_000_000;
    let memory = description.resources.memory_bytes.unwrap_or_default();
    line(format_args!("Resources:\n CPUs:\t\t\t{cpus}\n Memory:\t\t{}", bytes_binary(memory)));
    if let Some(ingress) = &description.ingress {
        line(format_args!("Ingress:\n Balancer:\t\t{}", ingress.balancer.name()));
        if !ingress.reason.is_empty() {
            line(format_args!(" Reason:\t\t{}", ingress.reason));
        }
    }
    line(format_args!("Engine Version:\t\t{}", description.engine.engine_version));
    if !description.engine.labels.is_empty() {
        line(format_args!("Engine Labels:\n{}", labels(&description.engine.labels).trim_end()));
    }
    if let Some(tls) = &description.tls_info {
        let mut line = |text: std::fmt::Arguments<'_>| {
            let _ = writeln!(out, "{text}");
        };
        line(format_args!("TLS Info:\n TrustRoot:\n{}", tls.trust_root.trim_end()));
        line(format_args!(" Issuer Subject:\t{}", tls.cert_issuer_subject));
        line(format_args!(" Issuer Public Key:\t{}", tls.cert_issuer_public_key));
    }
    out
}
