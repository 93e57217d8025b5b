//! A service for people. Source: docker/cli `service/formatter.go`, `serviceInspectPrettyTemplate`.

use std::fmt::Write as _;

use skep_common::spec::{
    ContainerSpec, HealthConfig, ModeKind, Nanos, PublishMode, Resources, ServiceSpec, UpdateConfig,
};
use skep_common::{Service, Timestamp};

use super::placement::preferences_text;
use crate::format::human::{bytes_binary, duration, go_duration};

/// The text of `inspect --pretty`.
pub(super) fn pretty(service: &Service, now: Timestamp) -> String {
    let spec = &service.spec;
    let mut out = format!("\nID:\t\t{}\nName:\t\t{}\n", service.id, spec.name);
    write_labels(&mut out, spec);
    write_mode(&mut out, service, now);
    write_status(&mut out, service, now);
    out.push_str("Placement:\n");
    if let Some(placement) = &spec.task_template.placement {
        if let Some(constraints) = &placement.constraints {
            line(&mut out, format_args!(" Constraints:\t[{}]", constraints.join(" ")));
        }
        let preferences = placement.preferences.as_deref().filter(|list| !list.is_empty());
        if let Some(preferences) = preferences {
            line(&mut out, format_args!(" Preferences:\t[{}]", preferences_text(preferences)));
        }
        if let Some(strategy) = placement.strategy {
            line(&mut out, format_args!(" Strategy:\t{}", strategy.name()));
        }
        if let Some(max) = placement.max_replicas {
            line(&mut out, format_args!(" Max Replicas Per Node:   {max}"));
        }
    }
    write_update(&mut out, "UpdateConfig", "Update order:     ", spec.update_config.as_ref());
    write_update(&mut out, "RollbackConfig", "Rollback order:   ", spec.rollback_config.as_ref());
    let container = spec.container();
    write_container(&mut out, &container);
    if let Some(resources) = &spec.task_template.resources {
        out.push_str("Resources:\n");
        write_amounts(&mut out, "Reservations", resources.reservations.as_ref());
        write_amounts(&mut out, "Limits", resources.limits.as_ref());
    }
    let mode = spec.endpoint_spec.as_ref().and_then(|endpoint| endpoint.mode.as_deref());
    line(&mut out, format_args!("Endpoint Mode:\t{}", mode.unwrap_or("vip")));
    let policy = spec.endpoint_spec.as_ref().and_then(|endpoint| endpoint.ingress_policy);
    if let Some(policy) = policy {
        line(&mut out, format_args!("Ingress Policy:\t{}", policy.name()));
    }
    write_ports(&mut out, service);
    if !service.conditions.is_empty() {
        out.push_str("Conditions:\n");
        service.conditions.iter().for_each(|one| line(&mut out, format_args!(" {}", one.message)));
    }
    write_health(&mut out, container.healthcheck.as_ref());
    out
}

fn line(out: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a String does not fail.
    let _ = writeln!(out, "{text}");
}

fn write_labels(out: &mut String, spec: &ServiceSpec) {
    let Some(labels) = spec.labels.as_ref().filter(|labels| !labels.is_empty()) else { return };
    out.push_str("Labels:\n");
    for (name, value) in labels {
        let separator = if value.is_empty() { "" } else { "=" };
        line(out, format_args!(" {name}{separator}{value}"));
    }
}

fn write_mode(out: &mut String, service: &Service, now: Timestamp) {
    match service.spec.mode_kind() {
        Some(ModeKind::Replicated(replicas)) => {
            line(out, format_args!("Service Mode:\tReplicated\n Replicas:\t{replicas}"));
        }
        Some(ModeKind::ReplicatedJob { total, concurrent }) => {
            line(out, format_args!("Service Mode:\tReplicated Job"));
            line(out, format_args!(" Total Completions:\t{total}"));
            line(out, format_args!(" Max Concurrent:\t{concurrent}"));
        }
        Some(ModeKind::GlobalJob) => line(out, format_args!("Service Mode:\tGlobal Job")),
        Some(ModeKind::Global) | None => line(out, format_args!("Service Mode:\tGlobal")),
    }
    if let Some(begun) = service.job_status.and_then(|status| status.last_execution) {
        let ago = duration(now.since(begun)).to_lowercase();
        line(out, format_args!(" Last execution:\t{} ago", ago));
    }
}

fn write_status(out: &mut String, service: &Service, now: Timestamp) {
    let Some(status) = &service.update_status else { return };
    line(out, format_args!("UpdateStatus:\n State:\t\t{}", status.state));
    let ago = |moment: Timestamp| duration(now.since(moment)).to_lowercase();
    if let Some(started) = status.started_at {
        line(out, format_args!(" Started:\t{} ago", ago(started)));
    }
    if let (Some(completed), "completed") = (status.completed_at, status.state.as_str()) {
        line(out, format_args!(" Completed:\t{} ago", ago(completed)));
    }
    line(out, format_args!(" Message:\t{}", status.message));
}

fn write_update(out: &mut String, title: &str, order: &str, config: Option<&UpdateConfig>) {
    let Some(config) = config else { return };
    line(out, format_args!("{title}:\n Parallelism:\t{}", config.parallelism.unwrap_or(1)));
    let given = |nanos: Option<Nanos>| nanos.filter(|nanos| nanos.0 > 0).map(Nanos::duration);
    if let Some(delay) = given(config.delay) {
        line(out, format_args!(" Delay:\t\t{}", go_duration(delay)));
    }
    line(
        out,
        format_args!(" On failure:\t{}", config.failure_action.as_deref().unwrap_or("pause")),
    );
    if let Some(monitor) = given(config.monitor) {
        line(out, format_args!(" Monitoring Period: {}", go_duration(monitor)));
    }
    if let Some(deadline) = given(config.progress_deadline) {
        line(out, format_args!(" Progress deadline: {}", go_duration(deadline)));
    }
    line(out, format_args!(" Max failure ratio: {}", config.max_failure_ratio.unwrap_or(0.0)));
    line(out, format_args!(" {order} {}", config.order.as_deref().unwrap_or("stop-first")));
}

fn write_container(out: &mut String, container: &ContainerSpec) {
    line(out, format_args!("ContainerSpec:\n Image:\t\t{}", container.image));
    let words = |words: &Option<Vec<String>>| words.as_ref().map(|words| words.join(" "));
    for (name, text) in [
        ("Args:\t\t", words(&container.args)),
        ("Env:\t\t", words(&container.env)),
        ("Dir:\t\t", container.dir.clone()),
        ("Init:\t\t", container.init.map(|init| init.to_string())),
        ("User: ", container.user.clone()),
    ] {
        if let Some(text) = text {
            line(out, format_args!(" {name}{text}"));
        }
    }
    let add = container.capability_add.as_ref().map(|names| names.join(", "));
    let drop = container.capability_drop.as_ref().map(|names| names.join(", "));
    if add.is_some() || drop.is_some() {
        out.push_str("Capabilities:\n");
        for (name, text) in [("Add", add), ("Drop", drop)] {
            if let Some(text) = text {
                line(out, format_args!(" {name}: {text}"));
            }
        }
    }
    if let Some(sysctls) = &container.sysctls {
        out.push_str("SysCtls:\n");
        sysctls.iter().for_each(|(name, value)| line(out, format_args!(" {name}: {value}")));
    }
    if let Some(ulimits) = &container.ulimits {
        out.push_str("Ulimits:\n");
        ulimits.iter().for_each(|limit| {
            line(out, format_args!(" {}: {}:{}", limit.name, limit.soft, limit.hard))
        });
    }
}

fn write_amounts(out: &mut String, title: &str, amounts: Option<&Resources>) {
    let Some(amounts) = amounts else { return };
    line(out, format_args!(" {title}:"));
    if let Some(nanos) = amounts.nano_cpus.filter(|nanos| *nanos > 0) {
        line(out, format_args!("  CPU:\t\t{}", nanos as f64 / 1e9));
    }
    if let Some(bytes) = amounts.memory_bytes.filter(|bytes| *bytes > 0) {
        line(out, format_args!("  Memory:\t{}", bytes_binary(bytes)));
    }
    if let Some(pids) = amounts.pids.filter(|pids| *pids > 0) {
        line(out, format_args!("  PIDs:\t\t{pids}"));
    }
}

fn write_ports(out: &mut String, service: &Service) {
    if service.endpoint.ports.is_empty() {
        return;
    }
    out.push_str("Ports:\n");
    for port in &service.endpoint.ports {
        let mode = match port.publish_mode.unwrap_or_default() {
            PublishMode::Ingress => "ingress",
            PublishMode::Host => "host",
        };
        line(out, format_args!(" PublishedPort = {}", port.published_port.unwrap_or_default()));
        line(out, format_args!("  Protocol = {}", port.protocol.unwrap_or_default().name()));
        line(out, format_args!("  TargetPort = {}", port.target_port));
        line(out, format_args!("  PublishMode = {mode}"));
        if let Some(version) = port.proxy_protocol {
            line(out, format_args!("  ProxyProtocol = {}", version.name()));
        }
    }
}

fn write_health(out: &mut String, health: Option<&HealthConfig>) {
    let Some(health) = health else { return };
    out.push_str(" Healthcheck:\n");
    let time = |nanos: Option<Nanos>| go_duration(nanos.unwrap_or_default().duration());
    line(out, format_args!("  Interval = {}", time(health.interval)));
    line(out, format_args!("  Retries = {}", health.retries.unwrap_or_default()));
    line(out, format_args!("  StartPeriod =\t{}", time(health.start_period)));
    line(out, format_args!("  Timeout =\t{}", time(health.timeout)));
    if let Some(test) = &health.test {
        out.push_str("  Tests:\n");
        test.iter().for_each(|word| line(out, format_args!("\t Test = {word}")));
    }
}
