//! What each node must hold: its tasks, and the images, secrets and configs they need.
//!
//! [`for_node`] reads it from the state, [`Stream`] turns the difference to what the node has into a
//! message of its session. A task is sent when it is new to the node or managers want something else
//! of it; its status is the node's own word and is not sent back.
//!
//! A version of a secret or a config is sent while a task of the node that has not ended uses it, to nobody
//! else, and once, since it never changes.
//!
//! Every image has [`COPIES`] holders where there are so many nodes: [`copy_duties`] chooses who
//! fetches one that no task of his needs. The choice is stable: as copies arrive, it does not move.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use skep_common::mistakes::{self, Mistake};
use skep_common::object::{NetworkAttachment, NodeState};
use skep_common::{Node, NodeId, Task, TaskId, TaskState};

use crate::secrets::PayloadKey;
use crate::store::{State, changed};
use crate::{image, secrets};

/// Holders of every image: one may be lost while another is being upgraded.
pub const COPIES: usize = 3;

/// Bytes of secrets and configs in one message: a quarter of what a message may have. The largest is
/// far below.
pub const PAYLOAD_BYTES_MAX: usize = 16 << 20;

/// Images that nodes fetch although no task of theirs needs them, by node.
pub type CopyDuties = BTreeMap<NodeId, BTreeSet<String>>;

/// All that a node must hold.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct AssignmentSet {
    /// Its tasks.
    pub tasks: BTreeMap<TaskId, AssignedTask>,
    /// Images to fetch or to keep, by the digest of the manifest.
    pub images: BTreeMap<String, AssignedImage>,
    /// Secrets and configs that its tasks use.
    pub payloads: BTreeSet<PayloadKey>,
}

/// A task as its node is to see it.
#[derive(Debug, Clone)]
pub struct AssignedTask {
    /// The task as stored.
    pub task: Arc<Task>,
    /// What the node shall do: the stored desired state, or `Running` while the task's removal from the
    /// balancers is not acknowledged.
    pub desired_state: TaskState,
}

impl AssignedTask {
    /// The task with the desired state that the node is to see.
    pub fn to_task(&self) -> Task {
        let mut task = (*self.task).clone();
        task.desired_state = self.desired_state;
        task
    }

    fn wanted(&self) -> (TaskState, &[NetworkAttachment]) {
        (self.desired_state, &self.task.networks_attachments)
    }
}

impl PartialEq for AssignedTask {
    /// Whether the node would do the same: a task's spec never changes, and its status is the node's.
    fn eq(&self, other: &Self) -> bool {
        self.task.id == other.task.id && self.wanted() == other.wanted()
    }
}

/// An image to fetch or to keep.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AssignedImage {
    /// Its name, for people.
    pub name: String,
    /// Other nodes that are alive and hold it, with their address; empty where the node itself holds it.
    pub holders: BTreeMap<NodeId, String>,
}

/// All that `node_id` must hold. The stop of tasks in `held_back` is not to be told yet.
///
/// Of the images in `reported`, which the node says it holds, those that the swarm knows are kept: the
/// store may learn of it later, and the node deletes what it is not told to keep.
pub fn for_node(
    state: &State,
    node_id: NodeId,
    duties: &CopyDuties,
    reported: &BTreeSet<String>,
    held_back: &BTreeSet<TaskId>,
) -> AssignmentSet {
    let mut set = AssignmentSet::default();
    let mut names: BTreeMap<&str, &str> = BTreeMap::new();
    let tasks = state.tasks_of_node(node_id).filter(|task| task.node_id == Some(node_id));
    for task in tasks {
        let is_held = held_back.contains(&task.id);
        let desired_state =
            if is_held { task.desired_state.min(TaskState::Running) } else { task.desired_state };
        set.tasks.insert(task.id, AssignedTask { task: task.clone(), desired_state });
        if uses_payloads(task) {
            let keys = secrets::keys_of(&task.spec);
            set.payloads.extend(keys.filter(|key| secrets::find(state, *key).is_some()));
        }
        let needs_image = desired_state.wants_run() && !task.status.state.is_terminal();
        if let Some((name, digest)) = needs_image.then(|| image_of(task)).flatten() {
            names.entry(digest).or_insert(name);
        }
    }
    let duties = duties.get(&node_id);
    let is_duty = |digest: &String| duties.is_some_and(|digests| digests.contains(digest));
    for record in state.images().values() {
        let is_held = record.holders.contains(&node_id) || reported.contains(&record.digest);
        let is_kept = is_held || is_duty(&record.digest);
        if is_kept || names.contains_key(record.digest.as_str()) {
            names.insert(&record.digest, &record.name);
        }
    }
    for (digest, name) in names {
        let holders = holders(state, digest, node_id);
        set.images.insert(digest.to_owned(), AssignedImage { name: name.to_owned(), holders });
    }
    set
}

/// From the moment that a task is its node's until it has ended there.
fn uses_payloads(task: &Task) -> bool {
    let state = task.status.state;
    let is_its_own = state >= TaskState::Assigned && !state.is_terminal();
    is_its_own || mistakes::is(Mistake::SecretToRefused)
}

/// The nodes that something changed for between two states; `None` means that each is to be looked at.
pub fn concerned(old: &State, new: &State) -> Option<BTreeSet<NodeId>> {
    let roots = [old, new].map(|state| {
        state.cluster().map(|cluster| (&cluster.root_ca_cert, &cluster.root_rotation))
    });
    if !changed(old.images(), new.images()).is_empty() || roots[0] != roots[1] {
        return None;
    }
    let nodes = changed(old.nodes(), new.nodes());
    for node_id in &nodes {
        let seen = |state: &State| state.node(*node_id).map(|node| seen_by_others(node));
        if seen(old) != seen(new) {
            return None;
        }
    }
    let tasks = changed(old.tasks(), new.tasks()).into_iter();
    let of_tasks = tasks.flat_map(|id| [old.task(id), new.task(id)]);
    let placed = of_tasks.flatten().filter_map(|task| task.node_id);
    Some(nodes.into_iter().chain(placed).collect())
}

/// What other nodes are told of a node, or hold because of it.
fn seen_by_others(node: &Node) -> (bool, String, Option<String>) {
    let manager = node.manager_status.as_ref().map(|manager| manager.addr.clone());
    (is_alive(node), node.address(), manager)
}

fn image_of(task: &Task) -> Option<(&str, &str)> {
    let name = task.spec.container_spec.as_ref().map_or("", |container| &container.image);
    let (name, digest) = image::split_digest(name);
    Some((name, digest?))
}

fn holders(state: &State, digest: &str, node_id: NodeId) -> BTreeMap<NodeId, String> {
    let records = state.images().values().filter(|record| record.digest == digest);
    let all: BTreeSet<NodeId> = records.flat_map(|record| record.holders.iter().copied()).collect();
    if all.contains(&node_id) {
        return BTreeMap::new();
    }
    let alive = all.into_iter().filter_map(|id| state.node(id)).filter(|node| is_alive(node));
    alive.map(|node| (node.id, node.address())).collect()
}

fn is_alive(node: &Node) -> bool {
    matches!(node.status.state, NodeState::Ready | NodeState::Disconnected)
}

/// Who fetches which image so that each has [`COPIES`] living holders.
///
/// The nodes with the fewest images are taken, counting of the images only those before this one: so
/// nothing that happens to a later image, and no copy that arrives, moves the choice.
pub fn copy_duties(state: &State) -> CopyDuties {
    let mut by_digest: BTreeMap<&str, BTreeSet<NodeId>> = BTreeMap::new();
    for record in state.images().values() {
        by_digest.entry(&record.digest).or_default().extend(&record.holders);
    }
    let mut loads: BTreeMap<NodeId, u32> =
        state.nodes().values().filter(|node| is_alive(node)).map(|node| (node.id, 0)).collect();
    let mut duties = CopyDuties::new();
    for (digest, holders) in by_digest {
        let living: BTreeSet<NodeId> =
            holders.into_iter().filter(|node_id| loads.contains_key(node_id)).collect();
        if living.is_empty() {
            continue; // Nobody to copy from.
        }
        let mut others: Vec<(u32, NodeId)> = loads
            .iter()
            .filter(|(node_id, _)| !living.contains(node_id))
            .map(|(node_id, load)| (*load, *node_id))
            .collect();
        others.sort_unstable();
        let chosen = others.into_iter().take(COPIES.saturating_sub(living.len()));
        let chosen: Vec<NodeId> = chosen.map(|(_, node_id)| node_id).collect();
        for node_id in living.iter().chain(&chosen) {
            *loads.entry(*node_id).or_insert(0) += 1;
        }
        for node_id in chosen {
            duties.entry(node_id).or_default().insert(digest.to_owned());
        }
    }
    duties
}

/// What makes one set of another.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Changes {
    /// New tasks, and those of which something else is wanted.
    pub tasks: Vec<AssignedTask>,
    /// Tasks to forget: to stop, with their containers and logs.
    pub removed_tasks: Vec<TaskId>,
    /// New images, and those with other holders.
    pub images: BTreeMap<String, AssignedImage>,
    /// Images that are not needed any more.
    pub removed_images: Vec<String>,
    /// New versions of secrets and configs.
    pub payloads: Vec<PayloadKey>,
    /// Versions to forget.
    pub removed_payloads: Vec<PayloadKey>,
}

impl Changes {
    /// Whether the two sets were equal.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What makes `new` of `old`.
pub fn diff(old: &AssignmentSet, new: &AssignmentSet) -> Changes {
    let is_news = |(task_id, task): &(&TaskId, &AssignedTask)| old.tasks.get(task_id) != Some(task);
    let is_new_image = |(digest, image): &(&String, &AssignedImage)| {
        old.images.get(digest.as_str()) != Some(image)
    };
    let gone = |task_id: &&TaskId| !new.tasks.contains_key(task_id);
    let gone_image = |digest: &&String| !new.images.contains_key(digest.as_str());
    Changes {
        tasks: new.tasks.iter().filter(is_news).map(|(_, task)| task.clone()).collect(),
        removed_tasks: old.tasks.keys().filter(gone).copied().collect(),
        images: new
            .images
            .iter()
            .filter(is_new_image)
            .map(|(digest, image)| (digest.clone(), image.clone()))
            .collect(),
        removed_images: old.images.keys().filter(gone_image).cloned().collect(),
        payloads: new.payloads.difference(&old.payloads).copied().collect(),
        removed_payloads: old.payloads.difference(&new.payloads).copied().collect(),
    }
}

impl AssignmentSet {
    /// Makes the changes, as the node does.
    pub fn apply(&mut self, changes: &Changes) {
        for task_id in &changes.removed_tasks {
            self.tasks.remove(task_id);
        }
        for digest in &changes.removed_images {
            self.images.remove(digest);
        }
        self.tasks.extend(changes.tasks.iter().map(|task| (task.task.id, task.clone())));
        self.images.extend(changes.images.clone());
        for key in &changes.removed_payloads {
            self.payloads.remove(key);
        }
        self.payloads.extend(&changes.payloads);
    }
}

/// One message to a node. A node that has not exactly `applies_to` asks for a new session.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// Number of the set that the changes apply to; 0 is the empty one, of a new session.
    pub applies_to: u64,
    /// Number of the set that they make.
    pub results_in: u64,
    /// The changes.
    pub changes: Changes,
}

/// What the node of one session has been told.
#[derive(Debug, Default)]
pub struct Stream {
    sequence: u64,
    told: AssignmentSet,
}

impl Stream {
    /// Number of the set that the node has been told; 0 before the first message.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The next message of the session, with [`PAYLOAD_BYTES_MAX`] bytes of secrets and configs at most;
    /// and whether that was all. `size` says how large one is.
    pub fn next_part(
        &mut self,
        mut set: AssignmentSet,
        size: impl Fn(PayloadKey) -> usize,
    ) -> (Option<Message>, bool) {
        let (mut n_bytes, mut is_all) = (0, true);
        let told = &self.told.payloads;
        set.payloads.retain(|key| {
            let is_news = !told.contains(key);
            n_bytes += if is_news { size(*key) } else { 0 };
            let fits = !is_news || n_bytes <= PAYLOAD_BYTES_MAX;
            is_all &= fits;
            fits
        });
        (self.next(set), is_all)
    }

    /// The next message of the session, where there is something to tell; the first always is.
    pub fn next(&mut self, set: AssignmentSet) -> Option<Message> {
        let changes = diff(&self.told, &set);
        if changes.is_empty() && self.sequence > 0 {
            return None;
        }
        let applies_to = self.sequence;
        self.sequence += 1;
        self.told = set;
        Some(Message { applies_to, results_in: self.sequence, changes })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use skep_common::object::Image;
    use skep_common::object::Secret;
    use skep_common::spec::{Base64, SecretSpec};
    use skep_common::{ImageId, Kind, Object, Timestamp};

    use super::*;
    use crate::testing::{World, service};

    fn image(id: u128, holders: &[u128]) -> Object {
        Object::Image(Box::new(Image {
            id: ImageId(id),
            meta: skep_common::Meta::default(),
            name: format!("docker.io/library/i{id}:latest"),
            digest: format!("sha256:{id}"),
            size: 1,
            created: None,
            holders: holders.iter().map(|n| NodeId(*n)).collect(),
        }))
    }

    #[test]
    fn a_change_concerns_those_who_are_told_something_else() {
        let node = |word: &str| Object::Node(Box::new(crate::testing::parse_node(word)));
        let manager = |addr: &str| {
            let mut node = crate::testing::parse_node("2");
            let addr = addr.to_owned();
            node.manager_status =
                Some(skep_common::object::ManagerStatus { raft_id: 2, addr, ..Default::default() });
            Object::Node(Box::new(node))
        };
        let moved = |port: u16| {
            let mut node = crate::testing::parse_node("2");
            node.status.port = port;
            Object::Node(Box::new(node))
        };
        let put =
            |object: Object| vec![crate::Action::Put { object, expect: crate::Expect::Present }];
        let mut cluster = crate::testing::cluster();
        cluster.root_ca_cert = "another".into();
        let stop = crate::TaskPatch {
            desired_state: Some(TaskState::Shutdown),
            ..crate::TaskPatch::of(TaskId(1))
        };
        for (name, actions, expect) in [
            ("a task", vec![crate::Action::PatchTask(stop)], Some(vec![1])),
            ("a label", put(node("2:zone=a")), Some(vec![2])),
            ("a node falls silent", put(node("2:disconnected")), Some(vec![2])),
            ("a holder is down", put(node("2:down")), None),
            ("an address", put(moved(2378)), None),
            ("a manager", put(manager("192.0.2.3:2377")), None),
            (
                "a root",
                vec![crate::Action::Put {
                    object: Object::Cluster(Box::new(cluster)),
                    expect: crate::Expect::Absent,
                }],
                None,
            ),
            (
                "an image",
                vec![crate::Action::Put { object: image(1, &[1]), expect: crate::Expect::Absent }],
                None,
            ),
        ] {
            let mut world = World::new("1 2 3", service(1), "1@1:running");
            let before = world.state.clone();
            world.apply(actions);
            let concerned = concerned(&before, &world.state);
            let ids = concerned.map(|ids| ids.iter().map(|id| id.0).collect::<Vec<u128>>());
            assert_eq!(ids, expect, "{name}");
        }
    }

    /// Words `NODE:IMAGE` of who copies what.
    fn words(duties: &CopyDuties) -> String {
        let words = duties.iter().flat_map(|(node_id, digests)| {
            digests.iter().map(move |digest| format!("{}:{}", node_id.0, &digest[7..]))
        });
        words.collect::<Vec<String>>().join(" ")
    }

    #[test]
    fn every_image_gets_three_living_holders() {
        for (name, nodes, images, expect) in [
            ("one holder, two copies", "1 2 3 4", &[&[1_u128][..]][..], "2:1 3:1"),
            ("enough", "1 2 3 4", &[&[1, 2, 3]], ""),
            ("a dead holder does not count", "1:down 2 3 4", &[&[1, 2, 3]], "4:1"),
            ("nobody to copy from", "1:down 2", &[&[1]], ""),
            ("no more than there are nodes", "1 2", &[&[1]], "2:1"),
            ("the least loaded", "1 2 3 4 5", &[&[1], &[1]], "2:1 3:1 4:2 5:2"),
        ] {
            let mut world = World::new(nodes, service(0), "");
            world.put((1..).zip(images).map(|(id, holders)| image(id, holders)).collect());
            assert_eq!(words(&copy_duties(&world.state)), expect, "{name}");
        }
    }

    #[test]
    fn a_copy_that_arrives_moves_no_duty() {
        let mut world = World::new("1 2 3 4 5 6", service(0), "");
        world.put((1..8).map(|id| image(id, &[id % 3 + 1])).collect());
        let first = copy_duties(&world.state);
        let pairs: Vec<(NodeId, String)> = first
            .iter()
            .flat_map(|(node_id, digests)| digests.iter().map(|digest| (*node_id, digest.clone())))
            .collect();
        assert_eq!(pairs.len(), 14);
        let mut left = first.clone();
        for (node_id, digest) in pairs.into_iter().rev() {
            left.get_mut(&node_id).unwrap().remove(&digest);
            world.apply(vec![crate::Action::ImageHolder { digest, node_id, holds: true }]);
            let mut now = copy_duties(&world.state);
            now.retain(|_, digests| !digests.is_empty());
            left.retain(|_, digests| !digests.is_empty());
            assert_eq!(now, left);
        }
    }

    #[test]
    fn a_node_keeps_what_it_holds_before_the_store_knows() {
        let mut world = World::new("1 2", service(0), "");
        world.put(vec![image(1, &[2]), image(2, &[1]), image(3, &[2])]);
        let reported: BTreeSet<String> = ["sha256:1".to_owned(), "sha256:9".to_owned()].into();
        let none = BTreeSet::new();
        let set = for_node(&world.state, NodeId(1), &CopyDuties::new(), &reported, &none);
        assert_eq!(set.images.keys().collect::<Vec<_>>(), ["sha256:1", "sha256:2"]);
    }

    #[test]
    fn a_node_is_told_its_tasks_and_images_but_not_its_own_reports() {
        let mut web = service(2);
        let container = skep_common::spec::ContainerSpec {
            image: "i1".into(),
            ..skep_common::spec::ContainerSpec::default()
        };
        web.spec.task_template.container_spec = Some(container);
        let mut world = World::new("1 2", web, "");
        world.put(vec![image(1, &[2])]);
        world.step();
        let told = |world: &World, held: &BTreeSet<TaskId>| {
            for_node(&world.state, NodeId(1), &CopyDuties::new(), &BTreeSet::new(), held)
        };
        let none = BTreeSet::new();
        let mut stream = Stream::default();
        let message = stream.next(told(&world, &none)).unwrap();
        assert_eq!((message.applies_to, message.results_in), (0, 1));
        assert_eq!(message.changes.tasks.len(), 1);
        let task_id = message.changes.tasks[0].task.id;
        let holders = &message.changes.images["sha256:1"].holders;
        assert_eq!(holders.keys().copied().collect::<Vec<_>>(), [NodeId(2)]);
        world.report(task_id, TaskState::Running);
        assert_eq!(stream.next(told(&world, &none)), None, "its own report is no news to it");
        let patch = crate::TaskPatch {
            desired_state: Some(TaskState::Shutdown),
            ..crate::TaskPatch::of(task_id)
        };
        world.apply(vec![crate::Action::PatchTask(patch)]);
        assert_eq!(stream.next(told(&world, &[task_id].into())), None, "held back");
        let message = stream.next(told(&world, &none)).unwrap();
        assert_eq!((message.applies_to, message.results_in), (1, 2));
        assert_eq!(message.changes.tasks[0].to_task().desired_state, TaskState::Shutdown);
        assert_eq!(message.changes.removed_images, ["sha256:1"], "no live task needs it");
    }

    #[test]
    fn a_node_is_given_the_secrets_of_its_tasks_from_their_assignment_to_their_end() {
        let reference = serde_json::json!({
            "SecretName": "key", "SecretID": skep_common::SecretId(100), "Version": 1,
        });
        let container = serde_json::json!({"Image": "i", "Secrets": [reference]});
        let mut web = service(1);
        web.spec.task_template.container_spec = serde_json::from_value(container).unwrap();
        let data = Some(Base64(b"hidden".to_vec()));
        let spec = SecretSpec { name: "key".to_owned(), data, ..SecretSpec::default() };
        for (word, expect) in [
            ("1@1:pending", false),
            ("1@1:assigned", true),
            ("1@1:running", true),
            ("1@1:running>shutdown", true),
            ("1@1:rejected", false),
            ("1@1:failed", false),
            ("1@1:shutdown", false),
            ("1@2:running", false),
        ] {
            let mut world = World::new("1 2", service(0), "");
            let action = secrets::create::<Secret>(&world.state, 100, spec.clone(), Timestamp(1));
            world.apply(vec![action.unwrap()]);
            world.replace(Object::Service(Box::new(web.clone())));
            world.put(vec![Object::Task(Box::new(crate::testing::parse_task(&web, 1, word)))]);
            let (reported, held_back) = Default::default();
            let set = for_node(&world.state, NodeId(1), &CopyDuties::new(), &reported, &held_back);
            let key = PayloadKey { kind: Kind::Secret, id: 100, version: 1 };
            assert_eq!(set.payloads.contains(&key), expect, "{word}");
            let changes = diff(&AssignmentSet::default(), &set);
            assert_eq!(changes.payloads, set.payloads.iter().copied().collect::<Vec<_>>());
        }
    }

    #[test]
    fn many_secrets_are_told_in_parts() {
        let key = |id| PayloadKey { kind: Kind::Config, id, version: 1 };
        let set = AssignmentSet { payloads: (0..5).map(key).collect(), ..AssignmentSet::default() };
        let mut stream = Stream::default();
        for expect in
            [(vec![key(0), key(1)], false), (vec![key(2), key(3)], false), (vec![key(4)], true)]
        {
            let (message, is_all) = stream.next_part(set.clone(), |_| PAYLOAD_BYTES_MAX / 2);
            let changes = message.unwrap().changes;
            assert_eq!(changes.removed_payloads, []);
            assert_eq!((changes.payloads, is_all), expect);
        }
        assert_eq!(stream.next_part(set, |_| PAYLOAD_BYTES_MAX / 2), (None, true));
    }

    proptest! {
        #[test]
        fn changes_make_the_new_set_of_the_old(
            old in proptest::collection::btree_map(0_u128..12, 0_usize..3, 0..12),
            new in proptest::collection::btree_map(0_u128..12, 0_usize..3, 0..12),
        ) {
            let set = |given: &BTreeMap<u128, usize>| {
                let mut set = AssignmentSet::default();
                for (id, kind) in given {
                    let word = ["1@1:running", "1@1:running>shutdown", "1@1:running>remove"][*kind];
                    let task = Arc::new(crate::testing::parse_task(&service(1), *id, word));
                    let desired_state = task.desired_state;
                    set.tasks.insert(task.id, AssignedTask { task, desired_state });
                    let holders = [(NodeId(*kind as u128), String::new())].into();
                    let image = AssignedImage { name: String::new(), holders };
                    set.images.insert(format!("sha256:{id}"), image);
                    let version = *kind as u64;
                    set.payloads.insert(PayloadKey { kind: Kind::Secret, id: *id, version });
                }
                set
            };
            let (mut told, new) = (set(&old), set(&new));
            let changes = diff(&told, &new);
            told.apply(&changes);
            prop_assert_eq!(&told, &new);
            prop_assert!(diff(&told, &new).is_empty());
        }
    }
}
