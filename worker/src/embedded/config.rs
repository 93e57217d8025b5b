//! From a task and its image to a container.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

use serde_json::json;
use skep_common::template::Template;
use skep_common::{Task, spec::ContainerSpec};
use skep_worker_core::image::{Digest, ImageConfig};
use skep_worker_core::oci::{self, from_common::container_input};

use super::NodeFacts;
use crate::container::ContainerConfig;
use crate::executor::Error;

/// Where the host's resolvers are listed.
const RESOLV_CONF: &str = "/etc/resolv.conf";

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
    input.labels.extend(swarm_labels(task, facts));
    let etc_hosts = etc_hosts(task, &spec, input.hostname.as_deref());
    // A host without the file resolves by 127.0.0.1; so does the container, in vain.
    let etc_resolv_conf = std::fs::read_to_string(RESOLV_CONF).unwrap_or_default();
    let image = oci::ImageConfig {
        entrypoint: Some(image.entrypoint.clone()),
        cmd: Some(image.cmd.clone()),
        env: Some(image.env.clone()),
        user: image.user.clone(),
        working_dir: image.working_dir.clone(),
        stop_signal: image.stop_signal.clone().unwrap_or_default(),
    };
    Ok(ContainerConfig { id: task.id.to_string(), layers, image, container: input, etc_hosts, etc_resolv_conf })
}

/// Replaces templates where Swarm does: host name and environment.
/// Source: SwarmKit `template/expand.go`.
fn expand(spec: &mut ContainerSpec, task: &Task, facts: &NodeFacts) -> Result<(), Error> {
    let context = json!({
        "Service": {
            "ID": task.service_id.to_string(),
            "Name": task.service_name,
            "Labels": {},
        },
        "Node": {
            "ID": facts.node_id.to_string(),
            "Hostname": facts.hostname,
            "Platform": { "OS": "linux", "Architecture": std::env::consts::ARCH },
        },
        "Task": {
            "ID": task.id.to_string(),
            "Name": format!("{}.{}", task.name(), task.id),
            "Slot": task.slot,
        },
    });
    let render = |text: &str| -> Result<String, Error> {
        if !text.contains("{{") {
            return Ok(text.to_owned());
        }
        let rendered = Template::parse(text).and_then(|template| template.render(&context));
        rendered.map_err(|error| Error(format!("template {text:?} cannot be expanded: {error}")))
    };
    if let Some(hostname) = &mut spec.hostname {
        *hostname = render(hostname)?;
    }
    for variable in spec.env.iter_mut().flatten() {
        *variable = render(variable)?;
    }
    Ok(())
}

/// Labels by which Docker's tools know the containers of a swarm.
fn swarm_labels(task: &Task, facts: &NodeFacts) -> BTreeMap<String, String> {
    let name = format!("{}.{}", task.name(), task.id);
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

fn etc_hosts(task: &Task, spec: &ContainerSpec, hostname: Option<&str>) -> String {
    let mut text = String::from("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    for line in spec.hosts.iter().flatten() {
        text.push_str(line);
        text.push('\n');
    }
    if let Some(address) = task.ingress_address() {
        let short = task.id.short();
        let own = hostname.unwrap_or(&short);
        writeln!(text, "{address}\t{own}").expect("a string takes what it is given");
    }
    text
}
