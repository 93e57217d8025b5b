//! A model of the replicated log: one manager's replica, with terms, elections, and a disk that loses
//! what was not synced.
//!
//! It is Raft as far as the rest of a manager can tell the difference: a command is committed once it
//! is on the disks of a majority, a new leader may overwrite what was not committed, and one that is far
//! behind is sent a snapshot. Words: Ongaro and Ousterhout, "In Search of an Understandable Consensus
//! Algorithm", section 5; pre-vote and read index are of Ongaro's dissertation, 9.6 and 6.4.
//!
//! # Invariants
//!
//! - What a replica promised (a vote, an entry) is on its disk before the promise is sent.
//! - A crash leaves the disk as of the last sync that ended, or with a part of what a sync was writing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, RngExt};
use skep_common::Timestamp;
use skep_common::mistakes::{self, Mistake};

use crate::log::{Disk, Entry, Payload, Snapshot};
use crate::membership::{ManagerId, Membership};

/// How often a leader speaks.
pub(crate) const HEARTBEAT: Duration = Duration::from_millis(100);
/// How long a follower believes in a leader that is silent.
const LEASE: Duration = Duration::from_millis(600);
/// What is added to it at random, so that not all stand for election at once.
const ELECTION_MILLIS: std::ops::Range<u64> = 300..600;
/// A leader that no majority answered for so long does not count itself as one.
pub(crate) const SILENCE_MAX: Duration = Duration::from_millis(900);
/// A learner that lacks no more than this gets its vote.
const LAG_MAX: u64 = 4;
/// Entries in one message at most.
const BATCH: usize = 16;

/// What replicas tell each other.
#[derive(Debug, Clone)]
pub(crate) enum RaftMessage {
    Vote {
        term: u64,
        last: (u64, u64),
        is_trial: bool,
    },
    VoteReply {
        term: u64,
        is_granted: bool,
        is_trial: bool,
    },
    Append {
        term: u64,
        before: (u64, u64),
        entries: Vec<Arc<Entry>>,
        commit: u64,
        round: u64,
    },
    AppendReply {
        term: u64,
        is_taken: bool,
        index: u64,
        round: u64,
    },
    Install {
        term: u64,
        snapshot: Arc<Snapshot>,
        round: u64,
    },
    /// The leader transfers its leadership to whom is named, if that one has the log up to `last`.
    TransferLeader {
        term: u64,
        to: ManagerId,
        last: (u64, u64),
    },
}

#[derive(Debug)]
enum Role {
    Follower,
    Candidate { is_trial: bool, votes: BTreeSet<ManagerId> },
    Leader(Box<Leading>),
}

/// What a leader knows of another member.
#[derive(Debug, Clone, Copy)]
struct Progress {
    next: u64,
    matched: u64,
    /// The newest round that it answered.
    answered: u64,
}

/// What a leader knows of the others.
#[derive(Debug)]
struct Leading {
    others: BTreeMap<ManagerId, Progress>,
    round: u64,
    /// When each of the last rounds began; the oldest first.
    began: Vec<(u64, Timestamp)>,
    quorum_at: Option<Timestamp>,
    reads: Vec<Read>,
}

/// Somebody wants to know how far the log is for certain.
#[derive(Debug, Clone)]
struct Read {
    id: u64,
    index: u64,
    round: u64,
}

impl RaftMessage {
    /// The highest format level of what it brings.
    pub(crate) fn level(&self) -> u32 {
        match self {
            Self::Install { snapshot, .. } => snapshot.level,
            Self::Append { entries, .. } => {
                entries.iter().map(|entry| entry.level()).max().unwrap_or(0)
            }
            Self::Vote { .. }
            | Self::VoteReply { .. }
            | Self::AppendReply { .. }
            | Self::TransferLeader { .. } => 0,
        }
    }
}

/// A message and whom it is for.
pub(crate) type Outgoing = (ManagerId, RaftMessage);

/// One manager's replica.
#[derive(Debug)]
pub(crate) struct Replica {
    me: ManagerId,
    disk: Disk,
    /// The voters and learners: what the log says last, committed or not.
    membership: Membership,
    synced: Disk,
    /// What a sync is writing.
    writing: Option<Disk>,
    is_dirty: bool,
    /// Promises that wait for the sync that is under way.
    promised: Vec<Outgoing>,
    /// Promises that wait for the sync after it.
    waiting: Vec<Outgoing>,
    role: Role,
    leader: Option<ManagerId>,
    commit: u64,
    /// What the leader has committed, as it said last.
    said_commit: u64,
    heard_at: Timestamp,
    election_at: Timestamp,
    /// Reads that a majority confirmed.
    confirmed: Vec<(u64, u64)>,
}

impl Replica {
    /// A replica that has this log.
    pub(crate) fn new(me: ManagerId, log: Vec<Arc<Entry>>, now: Timestamp) -> Self {
        let term = log.last().map_or(0, |entry| entry.term);
        Self::start(me, Disk { term, log, ..Disk::default() }, now)
    }

    fn start(me: ManagerId, disk: Disk, now: Timestamp) -> Self {
        Self {
            me,
            membership: disk.membership_at(u64::MAX).clone(),
            commit: disk.snapshot.index,
            said_commit: 0,
            synced: disk.clone(),
            disk,
            writing: None,
            is_dirty: false,
            promised: Vec::new(),
            waiting: Vec::new(),
            role: Role::Follower,
            leader: None,
            heard_at: now,
            // It waits as long as if it had just heard of a leader: there may be one.
            election_at: now.after(
                LEASE + Duration::from_millis(ELECTION_MILLIS.start + 97 * me.machine() as u64),
            ),
            confirmed: Vec::new(),
        }
    }

    /// The replica after a crash and a restart: of what was being written, a part may be there.
    pub(crate) fn restart(&self, now: Timestamp, rng: &mut StdRng) -> Self {
        let mut disk = self.synced.clone();
        if let Some(writing) = &self.writing {
            let is_append = writing.snapshot.index == disk.snapshot.index
                && writing.last_index() > disk.last_index()
                && writing.term_at(disk.last_index()) == Some(disk.last().0);
            if is_append {
                let n_written = rng.random_range(0..=writing.log.len() - disk.log.len());
                let from = disk.log.len();
                disk.log.extend_from_slice(&writing.log[from..from + n_written]);
                let torn_term = disk.last().0;
                if disk.term < torn_term {
                    (disk.term, disk.vote) = (torn_term, None);
                }
            }
        }
        Self::start(self.me, disk, now)
    }

    pub(crate) fn id(&self) -> ManagerId {
        self.me
    }

    /// The voters and learners, as far as this one knows.
    pub(crate) fn membership(&self) -> &Membership {
        &self.membership
    }

    /// All that was ever in the log as it is from `index` on: what may have been in force when that was committed.
    pub(crate) fn memberships_from(&self, index: u64) -> impl Iterator<Item = &Membership> {
        let later = self.disk.log.iter().filter_map(move |entry| match &entry.payload {
            Payload::Membership(membership) if entry.index > index => Some(membership),
            Payload::Membership(_) | Payload::Blank | Payload::Command { .. } => None,
        });
        std::iter::once(self.disk.membership_at(index)).chain(later)
    }

    /// Whether an entry is on its disk, or in a snapshot there.
    pub(crate) fn has_synced(&self, index: u64, term: u64) -> bool {
        index <= self.synced.snapshot.index || self.synced.term_at(index) == Some(term)
    }

    /// As leader: whether nothing keeps the members from changing: the change before is committed, and an entry of
    /// this leader.
    pub(crate) fn may_change(&self) -> bool {
        self.disk.last_change() <= self.commit
            && self.disk.term_at(self.commit) == Some(self.disk.term)
    }

    /// Whether what has been applied is all that a leader has committed, as it said just now. One that was just
    /// elected does not know how far entries are committed until one of its own term is.
    pub(crate) fn is_current(&self, applied: u64, now: Timestamp) -> bool {
        let is_known = || self.disk.term_at(self.said_commit) == Some(self.disk.term);
        match self.is_leader() {
            true => self.leads_surely(applied, now),
            false => self.is_content(now) && applied >= self.said_commit && is_known(),
        }
    }

    /// Whether it has heard of a leader just now, or leads.
    fn is_content(&self, now: Timestamp) -> bool {
        self.is_leader() || (self.leader.is_some() && now < self.heard_at.after(LEASE))
    }

    /// As leader: the round that the next message is of.
    pub(crate) fn next_round(&self) -> u64 {
        match &self.role {
            Role::Leader(leading) => leading.round + 1,
            Role::Follower | Role::Candidate { .. } => 0,
        }
    }

    /// As leader: whether another one has answered a message of that round or a later one.
    pub(crate) fn has_answered(&self, other: ManagerId, round: u64) -> bool {
        let Role::Leader(leading) = &self.role else { return false };
        other == self.me || leading.others.get(&other).is_some_and(|known| known.answered >= round)
    }

    /// As leader: whether another one lacks nothing.
    pub(crate) fn has_caught_up(&self, other: ManagerId) -> bool {
        let Role::Leader(leading) = &self.role else { return false };
        let known = leading.others.get(&other);
        known.is_some_and(|known| known.matched + LAG_MAX >= self.disk.last_index())
    }

    /// As leader: has the voter lead that has most of the log.
    pub(crate) fn transfer_leadership(&mut self, out: &mut Vec<Outgoing>) {
        let Role::Leader(leading) = &self.role else { return };
        let voters = leading.others.iter().filter(|(id, _)| self.membership.is_voter(**id));
        let best = voters.max_by_key(|(id, known)| (known.matched, known.answered, **id));
        let Some(to) = best.map(|(id, _)| *id) else { return };
        let (term, last) = (self.disk.term, self.disk.last());
        let others = leading.others.keys();
        out.extend(others.map(|other| (*other, RaftMessage::TransferLeader { term, to, last })));
    }

    pub(crate) fn term(&self) -> u64 {
        self.disk.term
    }

    pub(crate) fn leader(&self) -> Option<ManagerId> {
        self.leader
    }

    pub(crate) fn snapshot(&self) -> &Arc<Snapshot> {
        &self.disk.snapshot
    }

    /// The highest format level of what is on its disk.
    pub(crate) fn level(&self) -> u32 {
        let log = self.disk.log.iter().map(|entry| entry.level());
        log.fold(self.disk.snapshot.level, u32::max)
    }

    pub(crate) fn commit(&self) -> u64 {
        self.commit
    }

    /// A committed entry; `None` where it is in the snapshot.
    pub(crate) fn committed(&self, index: u64) -> Option<Arc<Entry>> {
        (index <= self.commit).then(|| self.disk.entry(index).cloned()).flatten()
    }

    pub(crate) fn is_leader(&self) -> bool {
        matches!(self.role, Role::Leader(_))
    }

    /// Whether it leads, applied an entry of its own term, and a majority answered lately.
    pub(crate) fn leads_surely(&self, applied: u64, now: Timestamp) -> bool {
        let Role::Leader(leading) = &self.role else { return false };
        let is_heard = leading.quorum_at.is_some_and(|at| now < at.after(SILENCE_MAX));
        is_heard && self.disk.term_at(applied) == Some(self.disk.term)
    }

    /// Those that are sent the log.
    fn others(&self) -> Vec<ManagerId> {
        match &self.role {
            Role::Leader(leading) => leading.others.keys().copied().collect(),
            Role::Follower | Role::Candidate { .. } => Vec::new(),
        }
    }

    /// What the log says of the members has changed.
    fn note_membership(&mut self) {
        let newest = self.disk.membership_at(u64::MAX);
        if self.membership == *newest {
            return;
        }
        self.membership = newest.clone();
        let (me, next) = (self.me, self.disk.last_index() + 1);
        if let Role::Leader(leading) = &mut self.role {
            let members = self.membership.members();
            let is_kept =
                |id: &ManagerId| members.contains(id) || mistakes::is(Mistake::RemovedCounted);
            leading.others.retain(|id, _| is_kept(id));
            for id in members.iter().filter(|id| **id != me) {
                let new = Progress { next, matched: 0, answered: 0 };
                leading.others.entry(*id).or_insert(new);
            }
        }
    }

    fn postpone_election(&mut self, now: Timestamp, rng: &mut impl Rng) {
        self.heard_at = now;
        self.election_at =
            now.after(LEASE + Duration::from_millis(rng.random_range(ELECTION_MILLIS)));
    }

    fn follow(&mut self, term: u64, leader: Option<ManagerId>) {
        if term > self.disk.term {
            (self.disk.term, self.disk.vote) = (term, None);
            self.is_dirty = true;
            self.leader = None;
        }
        self.role = Role::Follower;
        if leader.is_some() {
            self.leader = leader;
        }
    }

    /// Time has passed: stands for election, or speaks as the leader.
    pub(crate) fn tick(&mut self, now: Timestamp, rng: &mut impl Rng, out: &mut Vec<Outgoing>) {
        if self.is_leader() {
            self.speak(now, out);
        } else if now >= self.election_at && self.membership.is_voter(self.me) {
            self.postpone_election(now, rng);
            self.leader = None;
            self.role = Role::Candidate { is_trial: true, votes: [self.me].into() };
            self.ask_for_votes(self.disk.term + 1, true, out);
            self.count_votes(now, out);
        }
    }

    fn ask_for_votes(&mut self, term: u64, is_trial: bool, out: &mut Vec<Outgoing>) {
        let last = self.disk.last();
        let voters = self.membership.voters().into_iter().filter(|voter| *voter != self.me);
        let asked = voters.map(|other| (other, RaftMessage::Vote { term, last, is_trial }));
        // Its own vote is a promise, too.
        if is_trial { out.extend(asked) } else { self.waiting.extend(asked) }
    }

    fn count_votes(&mut self, now: Timestamp, out: &mut Vec<Outgoing>) {
        let Role::Candidate { is_trial, votes } = &self.role else { return };
        if !self.membership.is_quorum(|voter| votes.contains(&voter)) {
            return;
        }
        if *is_trial {
            self.stand(now, out);
            return;
        }
        let progress = Progress { next: self.disk.last_index() + 1, matched: 0, answered: 0 };
        let others = self.membership.members().iter().filter(|other| **other != self.me);
        let others = others.map(|other| (*other, progress)).collect();
        self.role = Role::Leader(Box::new(Leading {
            others,
            round: 0,
            began: Vec::new(),
            quorum_at: None,
            reads: Vec::new(),
        }));
        self.leader = Some(self.me);
        self.append(Payload::Blank);
        self.speak(now, out);
    }

    /// Stands for election in the next term.
    fn stand(&mut self, now: Timestamp, out: &mut Vec<Outgoing>) {
        (self.disk.term, self.disk.vote) = (self.disk.term + 1, Some(self.me));
        self.is_dirty = true;
        self.leader = None;
        self.role = Role::Candidate { is_trial: false, votes: [self.me].into() };
        self.ask_for_votes(self.disk.term, false, out);
        self.count_votes(now, out); // One that is alone needs no other.
    }

    /// Takes an entry as the leader; its place.
    pub(crate) fn append(&mut self, payload: Payload) -> u64 {
        let (index, term) = (self.disk.last_index() + 1, self.disk.term);
        let is_change = matches!(payload, Payload::Membership(_));
        self.disk.log.push(Arc::new(Entry { index, term, payload }));
        self.is_dirty = true;
        if is_change {
            self.note_membership();
        }
        index
    }

    /// Sends everybody what they lack, or a sign of life.
    pub(crate) fn speak(&mut self, now: Timestamp, out: &mut Vec<Outgoing>) {
        let Role::Leader(leading) = &mut self.role else { return };
        leading.round += 1;
        leading.began.push((leading.round, now));
        for other in self.others() {
            self.send_to(other, out);
        }
        self.note_quorum(); // One that is alone waits for nobody.
    }

    fn send_to(&mut self, other: ManagerId, out: &mut Vec<Outgoing>) {
        let Role::Leader(leading) = &mut self.role else { return };
        let (term, round, disk) = (self.disk.term, leading.round, &self.disk);
        let Some(known) = leading.others.get_mut(&other) else { return };
        let before = known.next - 1;
        let Some(before_term) = disk.term_at(before) else {
            known.next = disk.snapshot.index + 1;
            let snapshot = disk.snapshot.clone();
            out.push((other, RaftMessage::Install { term, snapshot, round }));
            return;
        };
        let first = usize::try_from(before - disk.snapshot.index).unwrap_or(usize::MAX);
        let entries: Vec<Arc<Entry>> = disk.log.iter().skip(first).take(BATCH).cloned().collect();
        known.next += entries.len() as u64;
        let (before, commit) = ((before_term, before), self.commit);
        out.push((other, RaftMessage::Append { term, before, entries, commit, round }));
    }

    /// Wants to know how far the log is; the answer comes as [`Replica::take_confirmed`].
    pub(crate) fn read(
        &mut self,
        id: u64,
        applied: u64,
        now: Timestamp,
        out: &mut Vec<Outgoing>,
    ) -> bool {
        if !self.leads_surely(applied, now) {
            return false;
        }
        let index = self.commit;
        if let Role::Leader(leading) = &mut self.role {
            leading.reads.push(Read { id, index, round: leading.round + 1 });
        }
        self.speak(now, out);
        true
    }

    /// Reads that a majority confirmed, with the index to wait for.
    pub(crate) fn take_confirmed(&mut self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.confirmed)
    }

    /// Takes a message of another replica.
    pub(crate) fn handle(
        &mut self,
        from: ManagerId,
        message: RaftMessage,
        now: Timestamp,
        rng: &mut impl Rng,
        out: &mut Vec<Outgoing>,
    ) {
        match message {
            RaftMessage::Vote { term, last, is_trial } => {
                self.handle_vote(from, term, last, is_trial, now, rng, out);
            }
            RaftMessage::VoteReply { term, is_granted, is_trial } => {
                if term > self.disk.term && !is_trial {
                    self.follow(term, None);
                }
                let own_term = self.disk.term;
                if let Role::Candidate { is_trial: own, votes } = &mut self.role {
                    let is_answer = *own == is_trial && term == own_term + u64::from(is_trial);
                    if is_answer && is_granted {
                        votes.insert(from);
                    }
                }
                self.count_votes(now, out);
            }
            RaftMessage::Append { term, before, entries, commit, round } => {
                if self.is_of_leader(from, term, now, rng) {
                    self.said_commit = commit;
                    self.handle_append(from, before, entries, commit, round);
                } else {
                    self.refuse(from, round);
                }
            }
            RaftMessage::Install { term, snapshot, round } => {
                if self.is_of_leader(from, term, now, rng) {
                    self.handle_install(from, snapshot, round);
                } else {
                    self.refuse(from, round);
                }
            }
            RaftMessage::TransferLeader { term, to, last } => {
                if term == self.disk.term && self.leader == Some(from) && !self.is_leader() {
                    // Its lease ends with that.
                    self.leader = None;
                    if to == self.me && self.disk.last() >= last && self.membership.is_voter(to) {
                        self.postpone_election(now, rng);
                        self.stand(now, out);
                    }
                }
            }
            RaftMessage::AppendReply { term, is_taken, index, round } => {
                if term > self.disk.term {
                    self.follow(term, None);
                } else if term == self.disk.term {
                    self.handle_reply(from, is_taken, index, round, out);
                }
            }
        }
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "they are the parts of one message and its moment"
    )]
    fn handle_vote(
        &mut self,
        from: ManagerId,
        term: u64,
        last: (u64, u64),
        is_trial: bool,
        now: Timestamp,
        rng: &mut impl Rng,
        out: &mut Vec<Outgoing>,
    ) {
        // Whoever hears a leader wants no other.
        let is_content = self.is_content(now);
        if is_trial {
            let is_granted = !is_content && term > self.disk.term && last >= self.disk.last();
            out.push((from, RaftMessage::VoteReply { term, is_granted, is_trial }));
            return;
        }
        if term > self.disk.term && (!is_content || self.is_leader()) {
            self.follow(term, None);
        }
        let is_free = self.disk.vote.is_none_or(|vote| vote == from);
        let is_granted = term == self.disk.term
            && is_free
            && last >= self.disk.last()
            && matches!(self.role, Role::Follower);
        if is_granted && self.disk.vote.is_none() {
            self.disk.vote = Some(from);
            self.is_dirty = true;
            self.postpone_election(now, rng);
        }
        let term = self.disk.term;
        self.waiting.push((from, RaftMessage::VoteReply { term, is_granted, is_trial }));
    }

    fn is_of_leader(
        &mut self,
        from: ManagerId,
        term: u64,
        now: Timestamp,
        rng: &mut impl Rng,
    ) -> bool {
        if term < self.disk.term {
            return false;
        }
        debug_assert!(term > self.disk.term || !self.is_leader(), "two leaders in term {term}");
        self.follow(term, Some(from));
        self.postpone_election(now, rng);
        true
    }

    fn refuse(&mut self, to: ManagerId, round: u64) {
        let (term, index) = (self.disk.term, self.disk.last_index());
        self.waiting.push((to, RaftMessage::AppendReply { term, is_taken: false, index, round }));
    }

    fn handle_append(
        &mut self,
        from: ManagerId,
        (before_term, before): (u64, u64),
        entries: Vec<Arc<Entry>>,
        commit: u64,
        round: u64,
    ) {
        let is_known =
            before < self.disk.snapshot.index || self.disk.term_at(before) == Some(before_term);
        if !is_known {
            let index = self.disk.last_index().min(before.saturating_sub(1)).max(self.commit);
            let term = self.disk.term;
            self.waiting
                .push((from, RaftMessage::AppendReply { term, is_taken: false, index, round }));
            return;
        }
        let matched = before + entries.len() as u64;
        let mut is_news = false;
        for entry in entries {
            match self.disk.term_at(entry.index) {
                _ if entry.index <= self.disk.snapshot.index => continue,
                Some(term) if term == entry.term => continue,
                Some(_) => self.disk.truncate(entry.index - 1),
                None => {}
            }
            self.disk.log.push(entry);
            is_news = true;
        }
        // Not at every heartbeat: it walks the log.
        if is_news {
            self.is_dirty = true;
            self.note_membership();
        }
        self.commit = self.commit.max(commit.min(matched));
        let term = self.disk.term;
        self.waiting
            .push((from, RaftMessage::AppendReply { term, is_taken: true, index: matched, round }));
    }

    fn handle_install(&mut self, from: ManagerId, snapshot: Arc<Snapshot>, round: u64) {
        let index = snapshot.index;
        if index > self.commit {
            if self.disk.term_at(index) == Some(snapshot.term) {
                let n_covered =
                    usize::try_from(index - self.disk.snapshot.index).unwrap_or(usize::MAX);
                self.disk.log.drain(..n_covered.min(self.disk.log.len()));
            } else {
                self.disk.log.clear();
            }
            self.disk.snapshot = snapshot;
            self.commit = index;
            self.is_dirty = true;
            self.note_membership();
        }
        let term = self.disk.term;
        self.waiting.push((from, RaftMessage::AppendReply { term, is_taken: true, index, round }));
    }

    fn handle_reply(
        &mut self,
        from: ManagerId,
        is_taken: bool,
        index: u64,
        round: u64,
        out: &mut Vec<Outgoing>,
    ) {
        let Role::Leader(leading) = &mut self.role else { return };
        let Some(known) = leading.others.get_mut(&from) else { return };
        known.answered = known.answered.max(round);
        if is_taken {
            known.matched = known.matched.max(index);
            known.next = known.next.max(index + 1);
        } else if index >= known.matched {
            known.next = index + 1;
        }
        let next = known.next;
        self.note_quorum();
        self.advance_commit();
        let has_more = next <= self.disk.last_index();
        if has_more {
            self.send_to(from, out);
        }
    }

    fn note_quorum(&mut self) {
        let (me, membership) = (self.me, &self.membership);
        let Role::Leader(leading) = &mut self.role else { return };
        let all = leading.others.keys().copied().chain([me]);
        let answered =
            |id: ManagerId| leading.others.get(&id).map_or(leading.round, |known| known.answered);
        let newest = membership.reached(all, answered);
        if let Some((_, at)) = leading.began.iter().find(|(round, _)| *round == newest) {
            leading.quorum_at = leading.quorum_at.max(Some(*at));
        }
        leading.began.retain(|(round, _)| *round > newest);
        let (done, open) =
            std::mem::take(&mut leading.reads).into_iter().partition(|r| r.round <= newest);
        leading.reads = open;
        let done: Vec<Read> = done;
        self.confirmed.extend(done.into_iter().map(|read| (read.id, read.index)));
    }

    fn advance_commit(&mut self) {
        let own = self.synced.last_index().min(self.disk.last_index());
        let Role::Leader(leading) = &self.role else { return };
        let all = leading.others.keys().copied().chain([self.me]);
        let matched = |id: ManagerId| leading.others.get(&id).map_or(own, |known| known.matched);
        let index = self.membership.reached(all, matched);
        if index > self.commit && self.disk.term_at(index) == Some(self.disk.term) {
            self.commit = index;
        }
        let is_out = !self.membership.members().contains(&self.me);
        if is_out && self.disk.last_change() <= self.commit {
            (self.role, self.leader) = (Role::Follower, None); // The others go on without it.
        }
    }

    /// Replaces the log up to `index` with a snapshot.
    pub(crate) fn compact(&mut self, index: u64, level: u32, bytes: Vec<u8>) {
        let Some(term) = self.disk.term_at(index) else { return };
        let membership = self.disk.membership_at(index).clone();
        let n_covered = usize::try_from(index - self.disk.snapshot.index).unwrap_or(usize::MAX);
        self.disk.log.drain(..n_covered.min(self.disk.log.len()));
        self.disk.snapshot = Arc::new(Snapshot { index, term, membership, level, bytes });
        self.is_dirty = true;
    }

    /// Begins a sync where one is due; else what waited goes out at once. True: a sync has begun.
    pub(crate) fn begin_sync(&mut self, out: &mut Vec<Outgoing>) -> bool {
        if self.writing.is_some() {
            return false;
        }
        if !self.is_dirty {
            out.append(&mut self.waiting);
            return false;
        }
        self.is_dirty = false;
        self.promised = std::mem::take(&mut self.waiting);
        self.writing = Some(self.disk.clone());
        true
    }

    /// A sync has ended: what was promised on it goes out.
    pub(crate) fn end_sync(&mut self, out: &mut Vec<Outgoing>) {
        if let Some(disk) = self.writing.take() {
            self.synced = disk;
            out.append(&mut self.promised);
            self.advance_commit();
        }
    }
}
