//! Modes: `--mode`, `--replicas`, `--max-concurrent` and the numbers of `service scale`.
//!
//! Source: docker/cli `service/opts.go`, `ToServiceMode`.

use anyhow::{Result, bail};
use clap::Args;
use skep_common::spec::{Replicated, ServiceMode, ServiceSpec};

/// Flags of `create` and `update` about how many tasks there are.
#[derive(Debug, Args, Default)]
pub(super) struct ModeFlags {
    /// Number of tasks; of a job, how many shall complete
    #[arg(long)]
    replicas: Option<u64>,
    /// Number of job tasks to run concurrently (default equal to --replicas)
    #[arg(long, value_name = "NUMBER")]
    max_concurrent: Option<u64>,
}

/// The words of `--mode`.
pub(super) const WORDS: [&str; 4] = ["replicated", "global", "replicated-job", "global-job"];

/// The mode of a new service, before `--replicas` and `--max-concurrent`.
pub(super) fn of_word(word: &str) -> ServiceMode {
    let mut mode = ServiceMode::default();
    match word {
        "global" => mode.global = Some(Default::default()),
        "replicated-job" => mode.replicated_job = Some(Default::default()),
        "global-job" => mode.global_job = Some(Default::default()),
        _ => return ServiceMode::of_replicas(Some(1)),
    }
    mode
}

/// Gives a new job the numbers that no flag gave: one task, and all of them at once.
pub(super) fn complete(spec: &mut ServiceSpec) {
    let job = spec.mode.as_mut().and_then(|mode| mode.replicated_job.as_mut());
    if let Some(job) = job {
        let total = *job.total_completions.get_or_insert(1);
        job.max_concurrent.get_or_insert(total);
    }
}

/// Sets the number of tasks, or of those that a job shall complete; a mode that was never given is the
/// replicated one. `false` for global modes.
pub(super) fn set_replicas(spec: &mut ServiceSpec, replicas: u64) -> bool {
    let mode = spec.mode.get_or_insert_default();
    if let Some(job) = &mut mode.replicated_job {
        job.total_completions = Some(replicas);
        return true;
    }
    let is_other = mode.global.is_some() || mode.global_job.is_some();
    if mode.replicated.is_none() && (is_other || !mode.extra.is_empty()) {
        return false;
    }
    mode.replicated = Some(Replicated { replicas: Some(replicas) });
    true
}

impl ModeFlags {
    pub(super) fn apply(&self, spec: &mut ServiceSpec) -> Result<()> {
        if let Some(replicas) = self.replicas
            && !set_replicas(spec, replicas)
        {
            bail!("replicas can only be used with replicated or replicated-job mode");
        }
        if let Some(max_concurrent) = self.max_concurrent {
            let job = spec.mode.as_mut().and_then(|mode| mode.replicated_job.as_mut());
            let Some(job) = job else {
                bail!("max-concurrent can only be used with replicated-job mode");
            };
            job.max_concurrent = Some(max_concurrent);
        }
        Ok(())
    }
}
