//! The networks that every node has without their being made. They are no objects of the store: services
//! name them, and nothing is granted for them.

use skep_common::spec::{
    NetworkAttachmentConfig, NetworkSpec, Predefined, PublishMode, ServiceSpec, is_without_uplink,
    predefined,
};
use skep_common::{Meta, Network};

use super::Error;

/// The networks as clients see them.
pub fn documents() -> [Network; 3] {
    Predefined::ALL.map(|one| Network {
        id: one.id(),
        meta: Meta::default(),
        spec: NetworkSpec {
            name: one.name().to_owned(),
            driver: Some(one.driver().to_owned()),
            ..NetworkSpec::default()
        },
        vni: 0,
        subnets: Vec::new(),
        pending_delete: false,
    })
}

/// Writes an attachment as it is stored. Nobody has a name on such a network, so aliases are dropped.
pub(super) fn normalize(config: &mut NetworkAttachmentConfig, one: Predefined) {
    one.name().clone_into(&mut config.target);
    config.aliases = None;
}

/// Refuses what a service cannot have on the networks that it names.
pub(super) fn check(spec: &ServiceSpec) -> Result<(), Error> {
    let configs = spec.networks();
    if !is_without_uplink(configs) {
        return Ok(());
    }
    let Some(one) = predefined(configs).find(|one| *one != Predefined::Bridge) else {
        return Ok(());
    };
    let name = one.name();
    if configs.len() > 1 {
        return Err(Error::Invalid(format!(
            "network {name} cannot be combined with other networks: name it alone"
        )));
    }
    for port in spec.ports() {
        let target = port.target_port;
        let is_of_host = one == Predefined::Host && port.publish_mode == Some(PublishMode::Host);
        if !is_of_host {
            return Err(Error::Invalid(format!(
                "target port {target} cannot be published on network {name}: {}",
                match one {
                    Predefined::Host => "publish it in host mode, or not at all",
                    Predefined::Bridge | Predefined::None => "nothing reaches its containers",
                }
            )));
        }
        let published = port.published_port.filter(|published| *published != 0);
        if let Some(published) = published.filter(|published| *published != target) {
            return Err(Error::Invalid(format!(
                "target port {target} cannot be published as {published} on network host: \
                 containers listen on the node's own ports"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn what_cannot_be_on_the_nodes_networks_is_refused() {
        let alone = |name: &str| json!([{"Target": name}]);
        let port = |published: u16, mode: &str| json!([{"TargetPort": 80, "PublishedPort": published, "PublishMode": mode}]);
        let no_way = "target port 80 cannot be published on network";
        for (networks, ports, expect) in [
            (alone("host"), json!([]), String::new()),
            (alone("none"), json!([]), String::new()),
            (alone("bridge"), port(8080, "ingress"), String::new()),
            (json!([{"Target": "bridge"}, {"Target": "front"}]), json!([]), String::new()),
            (
                json!([{"Target": "front"}, {"Target": "host"}]),
                json!([]),
                "network host cannot be combined with other networks: name it alone".to_owned(),
            ),
            (
                json!([{"Target": "none"}, {"Target": "bridge"}]),
                json!([]),
                "network none cannot be combined with other networks: name it alone".to_owned(),
            ),
            (alone("host"), port(80, "host"), String::new()),
            (alone("host"), port(0, "host"), String::new()),
            (
                alone("host"),
                port(81, "host"),
                "target port 80 cannot be published as 81 on network host: containers listen on \
                 the node's own ports"
                    .to_owned(),
            ),
            (
                alone("host"),
                port(80, "ingress"),
                format!("{no_way} host: publish it in host mode, or not at all"),
            ),
            (
                alone("none"),
                port(80, "host"),
                format!("{no_way} none: nothing reaches its containers"),
            ),
        ] {
            let spec: Value = json!({
                "TaskTemplate": {"Networks": networks}, "EndpointSpec": {"Ports": ports},
            });
            let spec: ServiceSpec = serde_json::from_value(spec).unwrap();
            let text = check(&spec).map_or_else(|error| error.to_string(), |()| String::new());
            assert_eq!(text, expect, "{networks} {ports}");
        }
    }
}
