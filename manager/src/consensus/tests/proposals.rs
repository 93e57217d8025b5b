//! Proposing, reading, leading.

use std::time::Duration;

use futures::future::join_all;
use skep_common::Kind;
use skep_manager_core::{Outcome, Refusal};

use super::harness::{Swarm, has_config, put_config, within};
use crate::consensus::{BootstrapError, Consensus, Options, propose};

#[tokio::test(flavor = "multi_thread")]
async fn a_single_manager_founds_a_swarm_writes_and_reads() {
    let swarm = Swarm::of(1).await;
    let manager = swarm.get(1);
    manager.bootstrap("addr-1").await.expect("founding again changes nothing");
    swarm.leader(None).await;
    let outcome = manager.propose(&put_config(1, 10)).await.unwrap();
    let Outcome::Applied(version) = outcome else { panic!("{outcome:?}") };
    assert!(has_config(&manager.state(), 1), "applied before it is acknowledged");
    assert_eq!(manager.read_state().await.unwrap().version(), version);

    let outcome = manager.propose(&put_config(1, 10)).await.unwrap();
    let is_taken =
        matches!(outcome, Outcome::Refused(Refusal::NameTaken { kind: Kind::Config, .. }));
    assert!(is_taken, "{outcome:?}");
    swarm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_manager_takes_writes_and_serves_current_reads() {
    let swarm = Swarm::of(3).await;
    let leader = swarm.leader(None).await;
    for (number, raft_id) in (1..).zip(swarm.ids()) {
        let command = put_config(number, 10);
        let proposed = within("a proposal", swarm.get(raft_id).propose(&command)).await;
        assert!(matches!(proposed.unwrap(), Outcome::Applied(_)));
        for reader in swarm.ids() {
            let state = within("a read", swarm.get(reader).read_state()).await.unwrap();
            assert!(has_config(&state, number), "{reader} reads what {raft_id} wrote");
        }
    }
    assert!(swarm.net.n_calls("propose") >= 2, "followers forward");
    assert!(swarm.net.n_calls("read index") >= 2, "followers ask for the read index");
    for raft_id in swarm.ids() {
        let status = swarm.get(raft_id).status().await;
        assert_eq!(status.leader, Some(leader));
        assert_eq!(status.members.len(), 3);
        assert_eq!(status.matched.is_empty(), raft_id != leader);
    }
    swarm.converge().await;
    swarm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_followers_proposals_travel_together() {
    let swarm = Swarm::of(3).await;
    let leader = swarm.leader(None).await;
    let follower = swarm.get(if leader == 1 { 2 } else { 1 });
    let before = swarm.net.n_calls("propose");
    let commands: Vec<_> = (1..=200).map(|number| put_config(number, 10)).collect();
    let outcomes = within("all", join_all(commands.iter().map(|c| follower.propose(c)))).await;
    assert!(outcomes.iter().all(|outcome| matches!(outcome, Ok(Outcome::Applied(_)))));
    let n_messages = swarm.net.n_calls("propose") - before;
    assert!(n_messages < 100, "200 proposals took {n_messages} messages");
    let state = swarm.converge().await;
    assert_eq!(state.configs().len(), 200);
    swarm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_leader_takes_over_when_one_is_killed() {
    let mut swarm = Swarm::of(3).await;
    let first = swarm.leader(None).await;
    swarm.get(first).propose(&put_config(1, 10)).await.unwrap();
    let term = swarm.get(first).leadership().borrow().term;
    swarm.kill(first).await;
    let survivor = swarm.ids()[0];
    within("a write", swarm.get(survivor).propose(&put_config(2, 10))).await.unwrap();
    let second = swarm.leader(None).await;
    assert_ne!(second, first);
    assert!(swarm.get(second).leadership().borrow().term > term);
    assert!(swarm.net.n_calls("pre-vote") > 0, "elections are asked about first");

    swarm.start(first).await;
    let state = swarm.converge().await;
    assert!(has_config(&state, 1) && has_config(&state, 2));
    swarm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_planned_in_another_term_or_place_is_not_taken() {
    let swarm = Swarm::of(3).await;
    let leader = swarm.leader(None).await;
    let term = swarm.get(leader).leadership().borrow().term;
    let proposed = swarm.get(leader).propose_as_leader(term, &put_config(1, 10)).await;
    assert!(matches!(proposed.unwrap(), Outcome::Applied(_)));

    let stale = swarm.get(leader).propose_as_leader(term - 1, &put_config(2, 10)).await;
    assert_eq!(stale.unwrap_err(), propose::Error::NotLeader { term: term - 1 });
    let follower = if leader == 1 { 2 } else { 1 };
    let elsewhere = swarm.get(follower).propose_as_leader(term, &put_config(2, 10)).await;
    let error = elsewhere.unwrap_err();
    assert!(!error.may_still_commit());
    assert_eq!(error, propose::Error::NotLeader { term });
    assert!(!has_config(&swarm.converge().await, 2));
    swarm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_is_decided_on_all_that_was_acknowledged_or_not_made() {
    let swarm = Swarm::of(3).await;
    let old = swarm.leader(None).await;
    let followers: Vec<u64> = swarm.ids().into_iter().filter(|id| *id != old).collect();
    let view = async |raft_id| within("a view", swarm.get(raft_id).view_to_write()).await.unwrap();
    let views = [(old, view(old).await), (followers[0], view(followers[0]).await)];
    swarm.net.cut_off(old);
    let new = swarm.leader(Some(old)).await;
    within("a write", swarm.get(new).propose(&put_config(1, 10))).await.unwrap();
    swarm.net.heal();
    swarm.converge().await;
    // Theirs hold nothing of it, whoever is asked to write what was decided on them.
    for ((viewer, view), writer) in
        views.iter().flat_map(|view| swarm.ids().into_iter().map(move |id| (view, id)))
    {
        assert!(!has_config(&view.state, 1));
        let command = put_config(2, 10);
        let written = swarm.get(writer).propose_on(view, &command);
        let error = within("a refusal", written).await.unwrap_err();
        let is_old = matches!(error, propose::Error::NotLeader { .. });
        assert!(is_old && !error.may_still_commit(), "{viewer}, {writer}: {error}");
    }
    for (number, raft_id) in (3..).zip(swarm.ids()) {
        let view = view(raft_id).await;
        assert!((1..number).filter(|n| *n != 2).all(|n| has_config(&view.state, n)), "{raft_id}");
        assert!(!view.is_confirmed(), "the write confirms it");
        let command = put_config(number, 10);
        let written = swarm.get(raft_id).propose_on(&view, &command);
        let written = within("a write", written).await.unwrap();
        assert!(matches!(written, Outcome::Applied(_)), "{written:?}");
    }
    assert!(!has_config(&swarm.converge().await, 2));
    swarm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_is_cut_off_stops_leading_and_says_what_it_does_not_know() {
    let mut swarm = Swarm::of(3).await;
    let old = swarm.leader(None).await;
    let term = swarm.get(old).leadership().borrow().term;
    swarm.net.cut_off(old);
    let mut leadership = swarm.get(old).leadership();
    let deposed = leadership.wait_for(|leadership| !leadership.is_self);
    within("the cut-off leader to doubt itself", deposed).await.unwrap();
    let new = swarm.leader(Some(old)).await;
    assert!(swarm.get(new).leadership().borrow().term > term);
    within("a write", swarm.get(new).propose(&put_config(1, 10))).await.unwrap();

    // Alone, it can neither read currently nor write, and it knows which write may survive.
    let mut impatient: Options = swarm.options(old);
    swarm.kill(old).await;
    impatient.timing.patience = Duration::from_millis(1500);
    swarm.insert(Consensus::start(impatient).await.unwrap());
    let error = swarm.get(old).propose(&put_config(2, 10)).await.unwrap_err();
    assert!(!error.may_still_commit(), "{error}");
    assert!(matches!(error, propose::Error::NoLeader { .. }), "{error}");
    swarm.get(old).read_state().await.expect_err("no quorum");

    swarm.net.heal();
    let state = swarm.converge().await;
    assert!(has_config(&state, 1) && !has_config(&state, 2));
    swarm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_no_majority_confirms_is_reported_as_open() {
    let mut swarm = Swarm::of(3).await;
    let old = swarm.leader(None).await;
    let others: Vec<_> = swarm.ids().into_iter().filter(|id| *id != old).collect();
    for other in &others {
        swarm.kill(*other).await;
    }
    // Its lease still holds: it takes the command, and loses the leadership or its patience.
    let manager = swarm.get(old).clone();
    let command = put_config(1, 10);
    let proposing = manager.propose(&command);
    let restarting = async {
        for other in &others {
            swarm.start(*other).await;
        }
    };
    let (result, ()) = within("an answer", futures::future::join(proposing, restarting)).await;
    match result {
        Ok(outcome) => assert!(matches!(outcome, Outcome::Applied(_)), "{outcome:?}"),
        Err(error) => assert!(error.may_still_commit(), "{error}"),
    }
    swarm.converge().await;
    swarm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_lead_is_handed_over_at_once() {
    let swarm = Swarm::of(3).await;
    let old = swarm.leader(None).await;
    assert!(within("the transfer", swarm.get(old).transfer_leader()).await);
    let new = swarm.leader(Some(old)).await;
    assert_ne!(new, old);
    assert!(swarm.net.n_calls("transfer") > 0);
    within("a write", swarm.get(old).propose(&put_config(1, 10))).await.unwrap();
    assert!(swarm.get(old).transfer_leader().await, "who does not lead has nothing to hand over");
    swarm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn feeds_end_and_calls_fail_once_a_manager_has_stopped() {
    let swarm = Swarm::of(1).await;
    let manager = swarm.get(1).clone();
    let mut feed = manager.subscribe();
    assert!(feed.next().await.unwrap().all_changed);
    manager.propose(&put_config(1, 10)).await.unwrap();
    let commit = within("a change", feed.next()).await.unwrap();
    assert_eq!(commit.changes.len(), 1);
    assert!(has_config(&commit.state, 1) && !commit.all_changed);
    swarm.stop().await;
    assert!(within("the end", feed.next()).await.is_none());
    assert!(!manager.leadership().borrow().is_self);
    assert!(matches!(manager.stopped().await, crate::consensus::StopReason::Shutdown));
    let error = manager.propose(&put_config(2, 10)).await.unwrap_err();
    assert!(!error.may_still_commit(), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manager_of_another_swarm_cannot_found_one() {
    let swarm = Swarm::of(2).await;
    let founded = swarm.get(2).bootstrap("addr-2").await;
    assert_eq!(founded.unwrap_err(), BootstrapError::AlreadyMember);
    swarm.stop().await;
}
