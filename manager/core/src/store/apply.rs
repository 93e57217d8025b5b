//! [`State::apply`]: one command, all or nothing.
//!
//! A command works on a clone, which is thrown away when an action is refused.

use std::sync::Arc;

use skep_common::mistakes::{self, Mistake};
use skep_common::object::{JobStatus, NetworkAttachment};
use skep_common::spec::{ModeKind, PublishMode};
use skep_common::{
    ConfigId, Image, ImageId, Kind, Meta, NetworkId, Node, NodeId, Object, SecretId, Service,
    ServiceId, StackId, Task, TaskId, TaskState, Timestamp, Version,
};

use super::{Change, Place, State};
use crate::command::{Action, Command, Expect, Outcome, Refusal, TaskPatch};
use crate::level;

/// What two bytes hold, but for 0 and the last. Nodes whose number is beyond the ingress pool's slices, or
/// beyond the packet mark's 12 bits, take no part in the mesh.
const NODE_NUMBER_MAX: u16 = 65_534;

impl State {
    /// Applies the entry at Raft index `index`, and says what became of it and what it changed.
    pub fn apply(&mut self, index: u64, command: &Command) -> (Outcome, Vec<Change>) {
        let version = Version { index };
        self.used_level = self.used_level.max(command.level);
        let mut next = self.clone();
        next.version = version;
        let mut changes = Vec::new();
        let level = command.level;
        let writer = Writer { at: command.at, version, level };
        for action in &command.actions {
            if let Err(refusal) = next.apply_action(&writer, action, &mut changes) {
                self.version = version;
                return (Outcome::Refused(refusal), Vec::new());
            }
        }
        *self = next;
        changes.sort_unstable();
        changes.dedup();
        (Outcome::Applied(version), changes)
    }

    /// Notes that an entry without a command (a membership change, a new leader's first) was applied.
    pub fn skip(&mut self, index: u64) {
        self.version = Version { index };
    }

    fn apply_action(
        &mut self,
        writer: &Writer,
        action: &Action,
        changes: &mut Vec<Change>,
    ) -> Result<(), Refusal> {
        match action {
            Action::Put { object, expect } => {
                let found = self.meta_of(object.kind(), object.raw_id());
                let meta = writer.meta(object.kind(), found, *expect, object.raw_id())?;
                if writer.level >= level::NETWORKS {
                    self.check_networks(object)?;
                }
                if writer.level >= level::CONTROL {
                    self.check_payloads(object)?;
                }
                changes.push(self.put(object, meta, writer.level)?);
            }
            Action::Delete { kind, id } => {
                if *kind == Kind::Network && writer.level >= level::NETWORKS {
                    self.refuse_used(NetworkId(*id))?;
                }
                if writer.level >= level::CONTROL {
                    self.refuse_used_payload(*kind, *id)?;
                }
                changes.extend(self.delete(*kind, *id));
            }
            Action::PatchTask(patch) => changes.extend(self.patch_task(writer, patch)?),
            Action::ImageHolder { digest, node_id, holds } => {
                self.set_image_holder(writer, digest, *node_id, *holds, changes);
            }
        }
        Ok(())
    }

    pub(crate) fn meta_of(&self, kind: Kind, id: u128) -> Option<Meta> {
        match kind {
            Kind::Cluster => {
                self.cluster.as_ref().filter(|object| object.id.0 == id).map(|o| o.meta)
            }
            Kind::Node => self.nodes.get(&NodeId(id)).map(|o| o.meta),
            Kind::Service => self.services.get(&ServiceId(id)).map(|o| o.meta),
            Kind::Task => self.tasks.get(&TaskId(id)).map(|o| o.meta),
            Kind::Network => self.networks.get(&NetworkId(id)).map(|o| o.meta),
            Kind::Secret => self.secrets.get(&SecretId(id)).map(|o| o.meta),
            Kind::Config => self.configs.get(&ConfigId(id)).map(|o| o.meta),
            Kind::Stack => self.stacks.get(&StackId(id)).map(|o| o.meta),
            Kind::Image => self.images.get(&ImageId(id)).map(|o| o.meta),
            Kind::Revision => None, // Never replaced.
        }
    }

    fn put(&mut self, object: &Object, meta: Meta, level: u32) -> Result<Change, Refusal> {
        let (kind, id) = (object.kind(), object.raw_id());
        match object {
            Object::Cluster(cluster) => {
                // A state is of one swarm; its object is replaced, never joined by a second one.
                if self.cluster.as_ref().is_some_and(|old| old.id != cluster.id) {
                    return Err(Refusal::NameTaken { kind, name: "default".to_owned() });
                }
                let mut cluster = (**cluster).clone();
                cluster.meta = meta;
                self.cluster = Some(Arc::new(cluster));
            }
            Object::Node(node) => self.put_node((**node).clone(), meta)?,
            Object::Service(service) => self.put_service((**service).clone(), meta, level)?,
            Object::Task(task) => return self.put_task((**task).clone(), meta),
            Object::Network(network) => self.put_network((**network).clone(), meta)?,
            Object::Secret(secret) => {
                let old = self.secrets.get(&secret.id).cloned();
                let old_name = old.as_ref().map(|old| old.spec.name.as_str());
                self.rename(kind, id, old_name, &secret.spec.name)?;
                let mut secret = (**secret).clone();
                secret.meta = meta;
                if let Some(old) = old {
                    let new = std::mem::take(&mut secret.versions);
                    secret.versions = self.merged_versions(kind, id, &old.versions, new);
                }
                self.secrets.insert(secret.id, Arc::new(secret));
            }
            Object::Config(config) => {
                let old = self.configs.get(&config.id).cloned();
                let old_name = old.as_ref().map(|old| old.spec.name.as_str());
                self.rename(kind, id, old_name, &config.spec.name)?;
                let mut config = (**config).clone();
                config.meta = meta;
                if let Some(old) = old {
                    let new = std::mem::take(&mut config.versions);
                    config.versions = self.merged_versions(kind, id, &old.versions, new);
                }
                self.configs.insert(config.id, Arc::new(config));
            }
            Object::Stack(stack) => {
                let old = self.stacks.get(&stack.id).map(|old| old.spec.name.clone());
                self.rename(kind, id, old.as_deref(), &stack.spec.name)?;
                let mut stack = (**stack).clone();
                stack.meta = meta;
                self.stacks.insert(stack.id, Arc::new(stack));
            }
            Object::Revision(revision) => return Ok(self.put_revision((**revision).clone(), meta)),
            Object::Image(image) => {
                let old = self.images.get(&image.id).map(|old| old.name.clone());
                self.rename(kind, id, old.as_deref(), &image.name)?;
                let mut image: Image = (**image).clone();
                image.meta = meta;
                self.images.insert(image.id, Arc::new(image));
            }
        }
        Ok(Change { kind, id, service_id: None, node_id: None })
    }

    fn put_node(&mut self, mut node: Node, meta: Meta) -> Result<(), Refusal> {
        node.meta = meta;
        if let Some(old) = self.nodes.get(&node.id) {
            node.number = old.number; // Addresses and marks in use were derived from it.
        } else {
            let free = |number: &u16| !self.node_numbers.contains_key(number);
            if node.number == 0 || !free(&node.number) {
                let lowest = (1..=NODE_NUMBER_MAX).find(free);
                node.number = lowest.ok_or(Refusal::NodeNumbersExhausted)?;
            }
        }
        self.node_numbers.insert(node.number, node.id);
        self.nodes.insert(node.id, Arc::new(node));
        Ok(())
    }

    fn put_service(
        &mut self,
        mut service: Service,
        meta: Meta,
        format_level: u32,
    ) -> Result<(), Refusal> {
        let old = self.services.get(&service.id).cloned();
        let twin = self.tasks.get(&TaskId(service.id.0));
        if twin.is_some_and(|task| task.standalone.is_some()) {
            return Err(id_taken(Kind::Service, service.id.0));
        }
        let old_name = old.as_ref().map(|old| old.spec.name.as_str());
        self.rename(Kind::Service, service.id.0, old_name, &service.spec.name)?;
        if let Some(old) = &old {
            for port in ingress_ports(old) {
                self.ports.remove(&port);
            }
        }
        for (protocol, port) in ingress_ports(&service) {
            if let Some(owner) = self.ports.insert((protocol, port), service.id) {
                let owner_name = self.services.get(&owner).map(|owner| owner.spec.name.clone());
                return Err(Refusal::PortInUse {
                    port,
                    protocol: protocol.name().to_owned(),
                    owner,
                    owner_name: owner_name.unwrap_or_else(|| service.spec.name.clone()),
                });
            }
        }
        self.move_virtual_ips(old.as_deref(), &service)?;
        service.meta = meta;
        if let (Some(old), true) = (&old, format_level >= level::CONTROL) {
            self.note_revision(old, &mut service, meta);
        }
        let spec_changed = old.as_ref().is_none_or(|old| {
            // A job that takes the place of one on its way out runs, although that did.
            let is_another = old.pending_delete && !service.pending_delete && is_job(&service);
            old.spec != service.spec || is_another
        });
        let old_status = old.as_ref().and_then(|old| old.job_status);
        service.spec_version = match old {
            Some(old) if !spec_changed => old.spec_version,
            _ => meta.version,
        };
        note_iteration(old_status, &mut service, meta);
        self.services.insert(service.id, Arc::new(service));
        Ok(())
    }

    fn put_task(&mut self, mut task: Task, meta: Meta) -> Result<Change, Refusal> {
        task.meta = meta;
        if task.standalone.is_some() && self.services.contains_key(&task.service_id) {
            return Err(id_taken(Kind::Task, task.id.0));
        }
        if let Some(old) = self.tasks.get(&task.id).cloned() {
            task.desired_state = task.desired_state.max(old.desired_state);
            if task.status.state < old.status.state {
                task.status = old.status.clone();
            }
            return self.index_task(Some(&old), task);
        }
        self.index_task(None, task)
    }

    /// Releases what a task held that is erased.
    pub(super) fn unindex_task(&mut self, task: &Task) {
        self.service_tasks.remove(&place_of(task));
        if let Some(name) = name_on_node(task) {
            self.names.remove(&(Kind::Task, name.into()));
        }
        if let Some(node_id) = task.node_id {
            self.node_tasks.remove(&(node_id, task.id));
        }
        self.release_addresses(task);
    }

    /// Writes a task, and in the place of what its old form held what the new one holds. What is the same
    /// stays as it is: most writes are reports of a state, and each entry of an index that is taken out and
    /// put back costs a copy of a part of it.
    pub(super) fn index_task(&mut self, old: Option<&Task>, task: Task) -> Result<Change, Refusal> {
        if let Some(name) = old.and_then(name_on_node) {
            self.names.remove(&(Kind::Task, name.into()));
        }
        if let Some(name) = name_on_node(&task) {
            self.rename(Kind::Task, task.id.0, None, &name)?;
        }
        let old_node = old.and_then(|old| old.node_id);
        if task.node_id != old_node {
            if let Some(node_id) = old_node {
                self.node_tasks.remove(&(node_id, task.id));
            }
            self.node_tasks.extend(task.node_id.map(|node_id| (node_id, task.id)));
        }
        let held = old.map_or(&[][..], held_addresses);
        if held != held_addresses(&task) {
            if let Some(old) = old {
                self.release_addresses(old);
            }
            self.claim_attachments(task.id, held_addresses(&task))?;
        }
        let change = change_of(&task);
        if let Some(old) = old.filter(|old| place_of(old) != place_of(&task)) {
            self.service_tasks.remove(&place_of(old));
        }
        let task = Arc::new(task);
        self.service_tasks.insert(place_of(&task), Arc::clone(&task));
        self.tasks.insert(task.id, task);
        Ok(change)
    }

    /// Changes a task where that is no matter of an index; an absent one is left alone.
    pub(super) fn edit_task(&mut self, task_id: TaskId, edit: impl FnOnce(&mut Task)) {
        let Some(task) = self.tasks.get_mut(&task_id) else { return };
        edit(Arc::make_mut(task));
        self.service_tasks.insert(place_of(task), Arc::clone(task));
    }

    fn patch_task(
        &mut self,
        writer: &Writer,
        patch: &TaskPatch,
    ) -> Result<Option<Change>, Refusal> {
        let Some(old) = patch.task_id.and_then(|id| self.tasks.get(&id)).cloned() else {
            return Ok(None);
        };
        let mut task = (*old).clone();
        task.desired_state = task.desired_state.max(patch.desired_state.unwrap_or(TaskState::New));
        if task.node_id.is_none() {
            task.node_id = patch.node_id;
        }
        if let Some(attachments) = &patch.networks_attachments {
            task.networks_attachments.clone_from(attachments);
        }
        if let Some(resources) = &patch.generic_resources {
            task.assigned_generic_resources.clone_from(resources);
        }
        if let Some(status) = &patch.status
            && (status.state >= task.status.state || mistakes::is(Mistake::StateFalls))
        {
            let advanced = status.state > task.status.state;
            let applied_at = if advanced { Some(writer.at) } else { task.status.applied_at };
            task.status = status.clone();
            task.status.applied_at = applied_at;
        }
        if task == *old {
            return Ok(None);
        }
        task.meta.version = writer.version;
        task.meta.updated_at = writer.at;
        self.index_task(Some(&old), task).map(Some)
    }

    fn set_image_holder(
        &mut self,
        writer: &Writer,
        digest: &str,
        node_id: NodeId,
        holds: bool,
        changes: &mut Vec<Change>,
    ) {
        let with_digest = self.images.values().filter(|image| image.digest == digest);
        let wrong = with_digest.filter(|image| image.holders.contains(&node_id) != holds);
        for mut image in wrong.map(|image| (**image).clone()).collect::<Vec<Image>>() {
            if holds {
                image.holders.insert(node_id);
            } else {
                image.holders.remove(&node_id);
            }
            image.meta.version = writer.version;
            image.meta.updated_at = writer.at;
            changes.push(Change {
                kind: Kind::Image,
                id: image.id.0,
                service_id: None,
                node_id: None,
            });
            self.images.insert(image.id, Arc::new(image));
        }
    }

    fn delete(&mut self, kind: Kind, id: u128) -> Option<Change> {
        let mut change = Change { kind, id, service_id: None, node_id: None };
        match kind {
            Kind::Cluster => return None, // A swarm ends when its last manager leaves, not by a write.
            Kind::Node => {
                let node = self.nodes.remove(&NodeId(id))?;
                self.node_numbers.remove(&node.number);
            }
            Kind::Service => {
                let service = self.services.remove(&ServiceId(id))?;
                for port in ingress_ports(&service) {
                    self.ports.remove(&port);
                }
                self.release_virtual_ips(&service);
                self.names.remove(&(kind, service.spec.name.as_str().into()));
                self.delete_revisions(service.id);
            }
            Kind::Revision => self.delete_revisions(ServiceId(id)),
            Kind::Task => {
                let task = self.tasks.remove(&TaskId(id))?;
                self.unindex_task(&task);
                change = change_of(&task);
            }
            Kind::Network => {
                self.delete_network(NetworkId(id))?;
            }
            Kind::Secret => {
                let secret = self.secrets.remove(&SecretId(id))?;
                self.names.remove(&(kind, secret.spec.name.as_str().into()));
            }
            Kind::Config => {
                let config = self.configs.remove(&ConfigId(id))?;
                self.names.remove(&(kind, config.spec.name.as_str().into()));
            }
            Kind::Stack => {
                let stack = self.stacks.remove(&StackId(id))?;
                self.names.remove(&(kind, stack.spec.name.as_str().into()));
            }
            Kind::Image => {
                let image = self.images.remove(&ImageId(id))?;
                self.names.remove(&(kind, image.name.as_str().into()));
            }
        }
        Some(change)
    }

    pub(super) fn rename(
        &mut self,
        kind: Kind,
        id: u128,
        old: Option<&str>,
        new: &str,
    ) -> Result<(), Refusal> {
        if old == Some(new) {
            return Ok(());
        }
        if self.names.contains_key(&(kind, new.into())) {
            return Err(Refusal::NameTaken { kind, name: new.to_owned() });
        }
        if let Some(old) = old {
            self.names.remove(&(kind, old.into()));
        }
        self.names.insert((kind, new.into()), id);
        Ok(())
    }
}

fn place_of(task: &Task) -> Place {
    (task.service_id, task.slot_key(), task.id)
}

/// The addresses that nobody else can have: none once it has ended.
fn held_addresses(task: &Task) -> &[NetworkAttachment] {
    let is_freed_early =
        mistakes::is(Mistake::AddressFreedEarly) && !task.desired_state.wants_run();
    if task.status.state.is_terminal() || is_freed_early {
        return &[];
    }
    &task.networks_attachments
}

fn change_of(task: &Task) -> Change {
    Change {
        kind: Kind::Task,
        id: task.id.0,
        service_id: Some(task.service_id),
        node_id: task.node_id,
    }
}

fn is_job(service: &Service) -> bool {
    service.spec.mode_kind().is_some_and(ModeKind::is_job)
}

/// Begins a job anew with each change of its spec.
fn note_iteration(old: Option<JobStatus>, service: &mut Service, meta: Meta) {
    let job_iteration = service.spec_version;
    let begun = JobStatus { job_iteration, last_execution: Some(meta.updated_at) };
    service.job_status = match old {
        _ if !is_job(service) => None,
        Some(old) if old.job_iteration == job_iteration => Some(old),
        _ => Some(begun),
    };
}

/// Nothing has the id of another object; a task that no service made has none that a service has, either.
fn id_taken(kind: Kind, id: u128) -> Refusal {
    Refusal::NameTaken { kind, name: TaskId(id).to_string() }
}

/// What names a task that no service made. Each node has names of its own, and a slash is in none of them.
fn name_on_node(task: &Task) -> Option<String> {
    task.standalone.as_ref()?;
    let is_leaving = task.desired_state >= TaskState::Remove;
    let name = || Some(format!("{}/{}", task.node_id?, task.service_name));
    if is_leaving { None } else { name() }
}

fn ingress_ports(
    service: &Service,
) -> impl Iterator<Item = (skep_common::spec::PortProtocol, u16)> {
    let ingress = |port: &&skep_common::spec::PortConfig| {
        port.publish_mode.unwrap_or_default() == PublishMode::Ingress
    };
    let numbered = service.endpoint.ports.iter().filter(ingress);
    numbered.filter_map(|port| Some((port.protocol.unwrap_or_default(), port.published_port?)))
}

/// Who writes, as far as `Meta` is concerned.
struct Writer {
    at: Timestamp,
    version: Version,
    level: u32,
}

impl Writer {
    fn meta(
        &self,
        kind: Kind,
        found: Option<Meta>,
        expect: Expect,
        id: u128,
    ) -> Result<Meta, Refusal> {
        let created_at = match (found, expect) {
            (None, Expect::Absent) => self.at,
            (Some(_), Expect::Absent) => {
                return Err(id_taken(kind, id));
            }
            (None, Expect::Version(_) | Expect::Present) => return Err(Refusal::NotFound { kind }),
            (Some(meta), Expect::Version(given)) if meta.version != given => {
                return Err(Refusal::OutOfSequence { kind, given, current: meta.version });
            }
            (Some(meta), Expect::Version(_) | Expect::Present) => meta.created_at,
        };
        Ok(Meta { version: self.version, created_at, updated_at: self.at })
    }
}
