//! The `deploy` key of a service: how many, where, with what, and how they are replaced.
//!
//! Source: docker/cli `cli/compose/convert/service.go`: `convertUpdateConfig` (parallelism 1 where
//! the file has none), `convertRestartPolicy` (`restart` counts where `deploy` says nothing).

use super::fields::{Field, Section};
use super::service::plain_pairs;
use super::tree::Value;
use super::{Report, known};
use crate::spec::{
    GenericResource, IngressPolicy, Labels, Placement, PlacementPreference, PlacementStrategy,
    ReplicatedJob, ResourceRequirements, Resources, RestartCondition, RestartPolicy, ServiceMode,
    SpreadOver, UpdateConfig,
};

/// What `deploy` says.
pub(super) struct Deploy {
    pub(super) labels: Labels,
    pub(super) mode: ServiceMode,
    pub(super) resources: Option<ResourceRequirements>,
    pub(super) restart_policy: Option<RestartPolicy>,
    pub(super) placement: Option<Placement>,
    pub(super) update_config: Option<UpdateConfig>,
    pub(super) rollback_config: Option<UpdateConfig>,
    pub(super) endpoint_mode: Option<String>,
    pub(super) ingress_policy: Option<IngressPolicy>,
}

/// Reads `deploy`, and `restart`, of a service.
pub(super) fn convert(service: &Section<'_>, report: &mut Report) -> Deploy {
    let restart = service.get("restart").and_then(|field| legacy_restart(&field, report));
    let Some(field) = service.get("deploy") else {
        return Deploy {
            labels: Labels::new(),
            mode: ServiceMode::of_replicas(None),
            resources: None,
            restart_policy: restart,
            placement: None,
            update_config: None,
            rollback_config: None,
            endpoint_mode: None,
            ingress_policy: None,
        };
    };
    let section = field.section(report);
    section.check(known::DEPLOY, &[], report);
    Deploy {
        labels: section.get("labels").map(|field| plain_pairs(&field, report)).unwrap_or_default(),
        mode: mode(&section, report),
        resources: section.get("resources").map(|field| resources(&field, report)),
        restart_policy: section
            .get("restart_policy")
            .map(|field| restart_policy(&field, report))
            .or(restart),
        placement: section.get("placement").map(|field| placement(&field, report)),
        update_config: section
            .get("update_config")
            .map(|field| update_config(&field, &["pause", "continue", "rollback"], report)),
        rollback_config: section
            .get("rollback_config")
            .map(|field| update_config(&field, &["pause", "continue"], report)),
        endpoint_mode: section
            .get("endpoint_mode")
            .and_then(|field| field.word(&["vip", "dnsrr"], report)),
        ingress_policy: section
            .get("x-skep-ingress-policy")
            .and_then(|field| field.word(&["spread", "local"], report))
            .and_then(|word| IngressPolicy::of(&word)),
    }
}

fn mode(section: &Section<'_>, report: &mut Report) -> ServiceMode {
    let replicas = section.get("replicas");
    let number = replicas.as_ref().and_then(|field| field.number::<u64>(report));
    let words = ["replicated", "global", "replicated-job", "global-job"];
    let word = section.get("mode").and_then(|field| field.word(&words, report));
    let mode = match word.as_deref() {
        Some("global") => {
            ServiceMode { global: Some(Default::default()), ..ServiceMode::default() }
        }
        Some("global-job") => {
            ServiceMode { global_job: Some(Default::default()), ..ServiceMode::default() }
        }
        Some("replicated-job") => {
            let job = ReplicatedJob {
                max_concurrent: number,
                total_completions: number,
                ..ReplicatedJob::default()
            };
            return ServiceMode { replicated_job: Some(job), ..ServiceMode::default() };
        }
        _ => return ServiceMode::of_replicas(number),
    };
    if let Some(field) = &replicas {
        let message = format!("{} has no meaning with a global mode; remove it", field.name);
        report.error(field.node.at, message);
    }
    mode
}

fn resources(field: &Field<'_>, report: &mut Report) -> ResourceRequirements {
    let section = field.section(report);
    section.check(known::RESOURCES, &[], report);
    let limits = section.get("limits").map(|field| amounts(&field, known::LIMITS, &[], report));
    let reservations = section
        .get("reservations")
        .map(|field| amounts(&field, known::RESERVATIONS, known::RESERVATIONS_LATER, report));
    ResourceRequirements { limits, reservations, extra: Default::default() }
}

fn amounts(
    field: &Field<'_>,
    known: &[&str],
    unsupported: &[&str],
    report: &mut Report,
) -> Resources {
    let section = field.section(report);
    section.check(known, unsupported, report);
    Resources {
        nano_cpus: section.get("cpus").and_then(|field| field.cpus(report)),
        memory_bytes: section.get("memory").and_then(|field| field.bytes(report)),
        pids: section
            .get("pids")
            .filter(|_| known.contains(&"pids"))
            .and_then(|field| field.number(report)),
        generic_resources: section
            .get("generic_resources")
            .filter(|_| known.contains(&"generic_resources"))
            .map(|field| generic_resources(&field, report))
            .filter(|list| !list.is_empty()),
        ..Resources::default()
    }
}

fn generic_resources(field: &Field<'_>, report: &mut Report) -> Vec<GenericResource> {
    let items = field.items(report);
    let read = |item| {
        let section = field.item(item).section(report);
        section.check(known::GENERIC_RESOURCE, &[], report);
        let section = section.get("discrete_resource_spec")?.section(report);
        section.check(known::DISCRETE_RESOURCE, &[], report);
        let kind = section.get("kind").and_then(|field| field.text(report))?;
        let value = section.get("value").and_then(|field| field.number(report))?;
        Some(GenericResource::Discrete { kind, value })
    };
    items.iter().filter_map(read).collect()
}

fn placement(field: &Field<'_>, report: &mut Report) -> Placement {
    let section = field.section(report);
    section.check(known::PLACEMENT, &[], report);
    let constraints = section.get("constraints").map(|field| field.texts(report));
    Placement {
        constraints: constraints.filter(|list| !list.is_empty()),
        preferences: section
            .get("preferences")
            .map(|field| preferences(&field, report))
            .filter(|list| !list.is_empty()),
        max_replicas: section.get("max_replicas_per_node").and_then(|field| field.number(report)),
        strategy: section
            .get("x-skep-strategy")
            .and_then(|field| field.word(&["spread", "binpack"], report))
            .and_then(|word| PlacementStrategy::of(&word)),
        ..Placement::default()
    }
}

fn preferences(field: &Field<'_>, report: &mut Report) -> Vec<PlacementPreference> {
    let items = field.items(report);
    let read = |item| {
        let section = field.item(item).section(report);
        section.check(known::PREFERENCE, &[], report);
        let spread_descriptor = section.get("spread").and_then(|field| field.text(report))?;
        Some(PlacementPreference { spread: Some(SpreadOver { spread_descriptor }) })
    };
    items.iter().filter_map(read).collect()
}

fn restart_policy(field: &Field<'_>, report: &mut Report) -> RestartPolicy {
    let section = field.section(report);
    section.check(known::RESTART_POLICY, &[], report);
    let word = section
        .get("condition")
        .and_then(|field| field.word(&["none", "on-failure", "any"], report));
    RestartPolicy {
        condition: word.map(|word| match word.as_str() {
            "none" => RestartCondition::None,
            "on-failure" => RestartCondition::OnFailure,
            _ => RestartCondition::Any,
        }),
        delay: section.get("delay").and_then(|field| field.duration(report)),
        max_attempts: section.get("max_attempts").and_then(|field| field.number(report)),
        window: section.get("window").and_then(|field| field.duration(report)),
    }
}

/// `no`, `always`, `unless-stopped` or `on-failure[:N]`.
fn legacy_restart(field: &Field<'_>, report: &mut Report) -> Option<RestartPolicy> {
    let text = match &field.node.value {
        // Unquoted `no` may have been meant; `false` is its other spelling.
        Value::Bool(false) => "no".to_owned(),
        _ => field.text(report)?,
    };
    let (word, count) = text.split_once(':').map_or((text.as_str(), None), |(w, c)| (w, Some(c)));
    let condition = match (word, count) {
        ("no", None) => return None,
        ("always" | "unless-stopped", None) => RestartCondition::Any,
        ("on-failure", _) => RestartCondition::OnFailure,
        _ => {
            field.refuse("no, always, unless-stopped, on-failure or on-failure:N", report);
            return None;
        }
    };
    let max_attempts = match count.map(str::parse::<u64>) {
        None => None,
        Some(Ok(count)) => Some(count),
        Some(Err(_)) => {
            field.refuse("on-failure:N with a whole number N", report);
            None
        }
    };
    Some(RestartPolicy { condition: Some(condition), max_attempts, ..Default::default() })
}

fn update_config(field: &Field<'_>, actions: &[&str], report: &mut Report) -> UpdateConfig {
    let section = field.section(report);
    section.check(known::UPDATE_CONFIG, &[], report);
    let parallelism = section.get("parallelism").map(|field| field.number(report));
    UpdateConfig {
        parallelism: parallelism.unwrap_or(Some(crate::limits::defaults::UPDATE_PARALLELISM)),
        delay: section.get("delay").and_then(|field| field.duration(report)),
        failure_action: section.get("failure_action").and_then(|field| field.word(actions, report)),
        monitor: section.get("monitor").and_then(|field| field.duration(report)),
        max_failure_ratio: section.get("max_failure_ratio").and_then(|field| field.ratio(report)),
        order: section
            .get("order")
            .and_then(|field| field.word(&["stop-first", "start-first"], report)),
        progress_deadline: section
            .get("x-skep-progress-deadline")
            .and_then(|field| field.duration(report)),
    }
}
