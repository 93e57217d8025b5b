//! From a task and its image to a container.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use skep_common::Task;
use skep_common::object::NetworkAttachment;
use skep_common::placeholder::{self, NodeFacts};
use skep_common::spec::generic;
use skep_common::spec::{ContainerSpec, DnsConfig, LogDriver, LogRotation, Predefined, predefined};
use skep_worker_core::dns::Scope;
use skep_worker_core::image::{Digest, ImageConfig};
use skep_worker_core::oci::{self, from_common::container_input};

use crate::container::ContainerConfig;
use crate::executor::Error;
use crate::net::names::RESOLVER;

/// Where the host's resolvers are listed; the second, where the first names but a local forwarder,
/// which a container cannot reach (systemd-resolved).
const RESOLV_CONF: [&str; 2] = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];

/// The host's own names.
const ETC_HOSTS: &str = "/etc/hosts";

/// The option that says how many dots a name has that is asked as it is before domains are searched.
const NDOTS: &str = "ndots:";

/// The digest that a task's image is pinned to.
pub(super) fn image_digest(task: &Task) -> Result<Digest, Error> {
    let image = task.spec.container_spec.as_ref().map_or("", |spec| spec.image.as_str());
    let digest = image.rsplit_once('@').and_then(|(_, digest)| digest.parse().ok());
    digest.ok_or_else(|| {
        Error(format!("no image named {image:?} in this swarm: load it with `skep image load` or `skep image import`"))
    })
}

/// The container of a task.
pub(super) fn container(
    task: &Task,
    image: &ImageConfig,
    layers: Vec<PathBuf>,
    facts: &NodeFacts,
) -> Result<ContainerConfig, Error> {
    let mut spec = task.spec.container_spec.clone().unwrap_or_default();
    expand(&mut spec, task, facts)?;
    let mut input = container_input(&spec, task.spec.resources.as_ref());
    input.env.extend(generic::environment(&task.assigned_generic_resources));
    input.labels.extend(swarm_labels(task, facts));
    input.host_network = on_host_network(task);
    if input.host_network {
        input.hostname.get_or_insert_with(|| facts.hostname.clone());
    }
    let log = task.spec.log_driver.as_ref().map_or(Ok(LogRotation::default()), LogDriver::rotation);
    let log = log.map_err(|error| Error::of(&error))?;
    let etc_hosts = match input.host_network {
        true => with_hosts(std::fs::read_to_string(ETC_HOSTS).unwrap_or_default(), &spec),
        false => etc_hosts(task, &spec, input.hostname.as_deref()),
    };
    let [first, second] = RESOLV_CONF.map(|path| std::fs::read_to_string(path).unwrap_or_default());
    let dns = spec.dns_config.clone().unwrap_or_default();
    let host = if dns.is_empty() { first.clone() } else { laid_over(&first, &dns) };
    let names = scope(task);
    let etc_resolv_conf = match (&names, input.host_network) {
        (Some(_), _) => ask_us(&host),
        // It reaches what the host reaches, also resolvers on its loopback.
        (None, true) => host,
        (None, false) => resolv_conf(&host, &second),
    };
    let image = oci::ImageConfig {
        entrypoint: Some(image.entrypoint.clone()),
        cmd: Some(image.cmd.clone()),
        env: Some(image.env.clone()),
        user: image.user.clone(),
        working_dir: image.working_dir.clone(),
        stop_signal: image.stop_signal.clone().unwrap_or_default(),
    };
    Ok(ContainerConfig {
        id: task.id.to_string(),
        layers,
        image,
        container: input,
        log,
        etc_hosts,
        etc_resolv_conf,
        names,
        payloads: Vec::new(),
    })
}

/// Replaces templates where Swarm does: host name and environment.
/// Source: SwarmKit `template/expand.go`.
fn expand(spec: &mut ContainerSpec, task: &Task, facts: &NodeFacts) -> Result<(), Error> {
    let expanded = |text: &str| -> Result<String, Error> {
        let expanded = placeholder::expand(text, task, facts);
        expanded.map_err(|error| Error(format!("template {text:?} cannot be expanded: {error}")))
    };
    if let Some(hostname) = &mut spec.hostname {
        *hostname = expanded(hostname)?;
    }
    for variable in spec.env.iter_mut().flatten() {
        *variable = expanded(variable)?;
    }
    Ok(())
}

/// Labels by which Docker's tools know the containers of a swarm.
fn swarm_labels(task: &Task, facts: &NodeFacts) -> BTreeMap<String, String> {
    let name = task.container_name();
    [
        ("com.docker.swarm.task", String::new()),
        ("com.docker.swarm.task.id", task.id.to_string()),
        ("com.docker.swarm.task.name", name),
        ("com.docker.swarm.node.id", facts.node_id.to_string()),
        ("com.docker.swarm.service.id", task.service_id.to_string()),
        ("com.docker.swarm.service.name", task.service_name.clone()),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_owned(), value))
    .collect()
}

/// The first text without loopback resolvers, or the second where none is left in the first.
/// Source: moby `libnetwork/resolvconf`.
fn resolv_conf(first: &str, second: &str) -> String {
    let is_resolver = |line: &str| line.trim_start().starts_with("nameserver");
    let is_reachable = |line: &&str| {
        let address =
            line.split_whitespace().nth(1).and_then(|text| text.parse::<std::net::IpAddr>().ok());
        !is_resolver(line) || address.is_some_and(|address| !address.is_loopback())
    };
    let filtered = |text: &str| {
        let lines: Vec<&str> = text.lines().filter(is_reachable).collect();
        lines.iter().any(|line| is_resolver(line)).then(|| lines.join("\n") + "\n")
    };
    filtered(first).or_else(|| filtered(second)).unwrap_or_default()
}

/// Whose questions are answered here: those of a container that is on overlay networks.
pub(super) fn scope(task: &Task) -> Option<Scope> {
    let spec = task.spec.container_spec.as_ref();
    scope_of(&task.networks_attachments, spec.and_then(|spec| spec.dns_config.as_ref()))
}

fn scope_of(attachments: &[NetworkAttachment], dns: Option<&DnsConfig>) -> Option<Scope> {
    let networks: Vec<_> = attachments.iter().filter_map(|one| one.network_id).collect();
    let texts = dns.into_iter().flat_map(|dns| dns.nameservers.iter().flatten());
    let nameservers = texts.filter_map(|text| text.parse().ok()).collect();
    let mut options = dns.into_iter().flat_map(|dns| dns.options.iter().flatten());
    let dotless_is_local = !options.any(|option| option.starts_with(NDOTS));
    (!networks.is_empty()).then_some(Scope { networks, nameservers, dotless_is_local })
}

/// The host's text with what a service says instead: list by list, as Docker does.
fn laid_over(host: &str, dns: &DnsConfig) -> String {
    let given = |list: &Option<Vec<String>>| list.clone().filter(|list| !list.is_empty());
    let (nameservers, search) = (given(&dns.nameservers), given(&dns.search));
    let options = given(&dns.options);
    let is_kept = |line: &&str| match line.split_whitespace().next().unwrap_or_default() {
        "nameserver" => nameservers.is_none(),
        "search" | "domain" => search.is_none(),
        "options" => options.is_none(),
        _ => true,
    };
    let mut lines: Vec<String> = host.lines().filter(is_kept).map(str::to_owned).collect();
    lines.extend(nameservers.iter().flatten().map(|address| format!("nameserver {address}")));
    // A single dot means that there is nothing to search.
    let search = search.filter(|search| search[..] != ["."]);
    lines.extend(search.map(|search| format!("search {}", search.join(" "))));
    lines.extend(options.map(|options| format!("options {}", options.join(" "))));
    lines.join("\n") + "\n"
}

/// The same text with this node as the only resolver. Names without a dot are asked as they are first,
/// since they are services, unless the text says otherwise. Source: moby `libnetwork/resolvconf`, `libnetwork/sandbox_dns_unix.go`.
fn ask_us(text: &str) -> String {
    let is_kept = |line: &&str| {
        let keyword = line.split_whitespace().next().unwrap_or_default();
        ["search", "domain", "options"].contains(&keyword)
    };
    let mut lines = vec![format!("nameserver {RESOLVER}")];
    let mut options = String::from("options");
    for line in text.lines().filter(is_kept) {
        match line.trim().strip_prefix("options") {
            Some(rest) => {
                for option in rest.split_whitespace() {
                    write!(options, " {option}").expect("a string takes what it is given");
                }
            }
            None => lines.push(line.trim().to_owned()),
        }
    }
    if !options.contains(NDOTS) {
        options.push_str(" ndots:0");
    }
    lines.push(options);
    lines.join("\n") + "\n"
}

/// The resolvers that the host asks, in its order; those on loopback are the host's own and fine.
pub(super) fn host_resolvers() -> Vec<IpAddr> {
    let of = |path: &str| -> Vec<IpAddr> {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let words = text.lines().map(|line| line.split_whitespace());
        let named =
            words.filter_map(|mut words| (words.next()? == "nameserver").then(|| words.next())?);
        named.filter_map(|address| address.parse().ok()).collect()
    };
    let resolvers = of(RESOLV_CONF[0]);
    if resolvers.is_empty() { of(RESOLV_CONF[1]) } else { resolvers }
}

fn etc_hosts(task: &Task, spec: &ContainerSpec, hostname: Option<&str>) -> String {
    let local = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n";
    let mut text = with_hosts(local.to_owned(), spec);
    if let Some(address) = own_address(&task.networks_attachments) {
        let short = task.id.short();
        let own = hostname.unwrap_or(&short);
        writeln!(text, "{address}\t{own}").expect("a string takes what it is given");
    }
    text
}

fn with_hosts(mut text: String, spec: &ContainerSpec) -> String {
    for line in spec.hosts.iter().flatten() {
        text.push_str(line);
        text.push('\n');
    }
    text
}

/// Whether a task's container has its node's network instead of one of its own.
pub(super) fn on_host_network(task: &Task) -> bool {
    is_on(task, Predefined::Host)
}

/// Whether a task is on one of the networks that nodes have by themselves.
pub(super) fn is_on(task: &Task, network: Predefined) -> bool {
    predefined(task.spec.networks.as_deref().unwrap_or_default()).any(|one| one == network)
}

/// What a container takes its own name for: its first network's address, its uplink's where it is on
/// none.
fn own_address(attachments: &[NetworkAttachment]) -> Option<Ipv4Addr> {
    let overlay = attachments.iter().find(|attachment| !attachment.ingress);
    overlay.or(attachments.first()).map(|attachment| attachment.address)
}

#[cfg(test)]
mod tests {
    use skep_common::NetworkId;

    use super::*;

    #[test]
    fn a_container_is_named_by_its_first_network() {
        let uplink = NetworkAttachment::uplink(Ipv4Addr::new(10, 192, 4, 1), 22);
        let overlay = |last| NetworkAttachment {
            ingress: false,
            address: Ipv4Addr::new(10, 0, 1, last),
            ..uplink.clone()
        };
        let address = |attachments: &[NetworkAttachment]| {
            own_address(attachments).map(|address| address.to_string()).unwrap_or_default()
        };
        assert_eq!(address(&[]), "");
        assert_eq!(address(std::slice::from_ref(&uplink)), "10.192.4.1");
        assert_eq!(address(&[uplink.clone(), overlay(5), overlay(6)]), "10.0.1.5");
    }

    fn dns(nameservers: &[&str], search: &[&str], options: &[&str]) -> DnsConfig {
        let list = |list: &[&str]| {
            (!list.is_empty()).then(|| list.iter().map(ToString::to_string).collect())
        };
        DnsConfig { nameservers: list(nameservers), search: list(search), options: list(options) }
    }

    #[test]
    fn a_service_names_resolvers_domains_and_options_instead_of_the_host() {
        let host = "search lab\nnameserver 10.0.0.2\noptions edns0\n";
        for (dns, expect) in [
            (
                dns(&["10.0.0.7", "fd00::7"], &[], &[]),
                "search lab\noptions edns0\nnameserver 10.0.0.7\nnameserver fd00::7\n",
            ),
            (
                dns(&[], &["a.example", "example"], &["ndots:2"]),
                "nameserver 10.0.0.2\nsearch a.example example\noptions ndots:2\n",
            ),
            (dns(&[], &["."], &[]), "nameserver 10.0.0.2\noptions edns0\n"),
        ] {
            assert_eq!(laid_over(host, &dns), expect, "{dns:?}");
        }
    }

    #[test]
    fn a_container_on_networks_asks_its_node() {
        for (host, expect) in [
            ("", "nameserver 127.0.0.11\noptions ndots:0\n"),
            (
                "# home\nsearch lab example\nnameserver 10.0.0.2\noptions ndots:5 timeout:2\noptions edns0\n",
                "nameserver 127.0.0.11\nsearch lab example\noptions ndots:5 timeout:2 edns0\n",
            ),
        ] {
            assert_eq!(ask_us(host), expect, "{host:?}");
        }
        let uplink = NetworkAttachment::uplink(Ipv4Addr::new(10, 192, 4, 1), 22);
        assert_eq!(scope_of(std::slice::from_ref(&uplink), None), None);
        let overlay = |id| NetworkAttachment { network_id: Some(NetworkId(id)), ..uplink.clone() };
        let scope = scope_of(&[overlay(9), uplink.clone(), overlay(3)], None).unwrap();
        assert_eq!(scope.networks, [NetworkId(9), NetworkId(3)]);
        assert!(scope.nameservers.is_empty() && scope.dotless_is_local);
        let own = dns(&["10.0.0.7"], &[], &["ndots:2"]);
        let scope = scope_of(&[overlay(9)], Some(&own)).unwrap();
        assert_eq!(scope.nameservers, [IpAddr::from([10, 0, 0, 7])]);
        assert!(!scope.dotless_is_local, "it may be completed elsewhere");
    }

    #[test]
    fn a_container_gets_resolvers_that_it_can_reach() {
        let plain = "search lab\nnameserver 10.0.0.2\n";
        let stub = "nameserver 127.0.0.53\noptions edns0\n";
        for (first, second, expect) in [
            (plain, "", plain),
            (stub, plain, plain),
            ("nameserver 127.0.0.1\nnameserver 10.0.0.2\n", plain, "nameserver 10.0.0.2\n"),
            (stub, "", ""),
            ("", "", ""),
        ] {
            assert_eq!(resolv_conf(first, second), expect, "{first:?}");
        }
    }
}
