//! `networks`: those that the document declares, and those that a service is on.
//!
//! Only networks that a service is on are made. A service that names none is on `default`, which
//! need not be declared. Source: docker/cli `cli/compose/convert/{compose,service}.go`.

use std::collections::{BTreeMap, BTreeSet};

use super::fields::{Field, Section};
use super::service::{STACK_LABEL, plain_pairs};
use super::tree::{Key, Node, Value};
use super::{Report, known};
use crate::spec::{Ipam, IpamConfig, NetworkAttachmentConfig, NetworkSpec, Predefined};

/// The network of services that name none.
const DEFAULT: &str = "default";
/// The driver where none is named.
const DRIVER: &str = "overlay";

/// The networks of a document.
#[derive(Debug)]
pub(super) struct Networks {
    by_key: BTreeMap<String, Declared>,
    used: BTreeSet<String>,
}

/// What a key of `networks` stands for.
#[derive(Debug)]
struct Declared {
    /// Its full name.
    name: String,
    /// The spec to make it of; `None` where it exists outside of the stack.
    spec: Option<NetworkSpec>,
}

impl Networks {
    /// Reads the top-level mapping.
    pub(super) fn read(stack: &str, field: Option<&Field<'_>>, report: &mut Report) -> Self {
        let mut by_key = BTreeMap::new();
        if let Some(field) = field {
            for (key, node) in field.entries(report) {
                by_key.insert(key.name.clone(), declared(stack, key, node, report));
            }
        }
        by_key.entry(DEFAULT.to_owned()).or_insert_with(|| {
            let name = format!("{stack}_{DEFAULT}");
            Declared { spec: Some(own(stack, &name)), name }
        });
        Self { by_key, used: BTreeSet::new() }
    }

    /// The attachments of a service, by the networks' names.
    pub(super) fn of_service(
        &mut self,
        service: &str,
        field: Option<&Field<'_>>,
        mode: Option<&Field<'_>>,
        report: &mut Report,
    ) -> Vec<NetworkAttachmentConfig> {
        if let Some(mode) = mode {
            return predefined(field, mode, report).into_iter().collect();
        }
        let wanted = match field {
            Some(field) => attachments(service, field, report),
            None => BTreeMap::from([(DEFAULT.to_owned(), Vec::new())]),
        };
        let mut configs = Vec::new();
        for (key, aliases) in wanted {
            let Some(declared) = self.by_key.get(&key) else {
                let at = field.map(|field| field.node.at).unwrap_or_default();
                let advice = "declare it under the top-level key 'networks'";
                report.error(at, format!("service {service} is on the network {key}, which the file does not have; {advice}"));
                continue;
            };
            self.used.insert(key);
            if let Some(predefined) = Predefined::find(&declared.name) {
                configs.push(attachment(predefined));
                continue;
            }
            let mut names = vec![service.to_owned()];
            names.extend(aliases.into_iter().filter(|alias| alias != service));
            configs.push(NetworkAttachmentConfig {
                target: declared.name.clone(),
                aliases: Some(names),
                driver_opts: None,
            });
        }
        configs.sort_by(|a, b| a.target.cmp(&b.target));
        configs
    }

    /// The specs of the networks that services are on and that are the stack's own, by name.
    pub(super) fn into_specs(self) -> Vec<NetworkSpec> {
        let Self { by_key, used } = self;
        let of_used = by_key.into_iter().filter(|(key, _)| used.contains(key));
        let mut specs: Vec<_> = of_used.filter_map(|(_, declared)| declared.spec).collect();
        specs.sort_by(|a, b| a.name.cmp(&b.name));
        specs
    }
}

/// What `network_mode` says: the service is on one of the networks that nodes have by themselves.
fn predefined(
    networks: Option<&Field<'_>>,
    mode: &Field<'_>,
    report: &mut Report,
) -> Option<NetworkAttachmentConfig> {
    if networks.is_some() {
        let advice = "remove one of them";
        report.error(
            mode.node.at,
            format!("{} and networks cannot be combined; {advice}", mode.name),
        );
    }
    let word = mode.word(&Predefined::ALL.map(Predefined::name), report)?;
    Predefined::find(&word).map(attachment)
}

/// Nobody has a name on a network of the node's.
fn attachment(predefined: Predefined) -> NetworkAttachmentConfig {
    let target = predefined.name().to_owned();
    NetworkAttachmentConfig { target, ..NetworkAttachmentConfig::default() }
}

/// A network of the stack with nothing said about it.
fn own(stack: &str, name: &str) -> NetworkSpec {
    NetworkSpec {
        name: name.to_owned(),
        labels: Some([(STACK_LABEL.to_owned(), stack.to_owned())].into()),
        driver: Some(DRIVER.to_owned()),
        ..NetworkSpec::default()
    }
}

fn declared(stack: &str, key: &Key, node: &Node, report: &mut Report) -> Declared {
    let section = Section::new(format!("network {}", key.name), String::new(), node, report);
    section.check(known::NETWORK, known::NETWORK_LATER, report);
    let given = section.get("name").and_then(|field| field.text(report));
    if let Some(name) = external(&section, report) {
        for word in known::NETWORK.iter().filter(|word| !["name", "external"].contains(word)) {
            if let Some(field) = section.get(word) {
                let advice = "an external network is used as it is; remove the key";
                report.error(field.node.at, format!("{}: {advice}", field.name));
            }
        }
        return Declared { name: name.or(given).unwrap_or_else(|| key.name.clone()), spec: None };
    }
    let name = given.unwrap_or_else(|| format!("{stack}_{}", key.name));
    let mut spec = own(stack, &name);
    if let Some(field) = section.get("labels") {
        spec.labels.get_or_insert_default().extend(plain_pairs(&field, report));
    }
    let mut flag = |key: &str| section.get(key).and_then(|field| field.boolean(report));
    spec.internal = flag("internal");
    spec.attachable = flag("attachable");
    spec.enable_ipv6 = flag("enable_ipv6");
    if let Some(driver) = section.get("driver").and_then(|field| field.text(report)) {
        spec.driver = Some(driver);
    }
    spec.options = section.get("driver_opts").map(|field| plain_pairs(&field, report));
    spec.ipam = section.get("ipam").map(|field| ipam(&field, report));
    Declared { name, spec: Some(spec) }
}

/// Whether `external` is set, and the name that its old form gives.
pub(super) fn external(section: &Section<'_>, report: &mut Report) -> Option<Option<String>> {
    let field = section.get("external")?;
    if let Value::Map(_) = field.node.value {
        let old = field.section(report);
        old.check(&["name"], &[], report);
        return Some(old.get("name").and_then(|field| field.text(report)));
    }
    field.boolean(report)?.then_some(None)
}

fn ipam(field: &Field<'_>, report: &mut Report) -> Ipam {
    let section = field.section(report);
    section.check(known::IPAM, known::IPAM_LATER, report);
    let config = section.get("config").map(|field| {
        let items = field.items(report).iter();
        items.map(|node| ipam_config(&field.item(node), report)).collect()
    });
    let driver = section.get("driver").and_then(|field| field.text(report));
    Ipam { driver, config, ..Ipam::default() }
}

fn ipam_config(field: &Field<'_>, report: &mut Report) -> IpamConfig {
    let section = field.section(report);
    section.check(known::IPAM_CONFIG, &[], report);
    let mut text = |key: &str| section.get(key).and_then(|field| field.text(report));
    IpamConfig {
        subnet: text("subnet"),
        ip_range: text("ip_range"),
        gateway: text("gateway"),
        auxiliary_addresses: section.get("aux_addresses").map(|field| plain_pairs(&field, report)),
    }
}

/// The keys of networks that a service names, each with its aliases.
fn attachments(
    service: &str,
    field: &Field<'_>,
    report: &mut Report,
) -> BTreeMap<String, Vec<String>> {
    match &field.node.value {
        Value::Map(entries) => {
            let of_entry = |(key, node): &(Key, Node), report: &mut Report| {
                let prefix = format!("networks.{}.", key.name);
                let section = Section::new(format!("service {service}"), prefix, node, report);
                section.check(known::ATTACHMENT, known::ATTACHMENT_LATER, report);
                let aliases = section.get("aliases").map(|field| field.texts(report));
                (key.name.clone(), aliases.unwrap_or_default())
            };
            entries.iter().map(|entry| of_entry(entry, report)).collect()
        }
        Value::List(_) => field.texts(report).into_iter().map(|key| (key, Vec::new())).collect(),
        _ => {
            field.refuse("a list of networks or a mapping", report);
            BTreeMap::new()
        }
    }
}
