//! Adding, moving and removing managers.

use std::time::Duration;

use skep_common::object::ManagerStatus;
use skep_common::spec::{Availability, NodeRole};
use skep_common::{NodeId, Object};
use skep_manager_core::{Action, Command, Expect, Outcome};
use skep_runtime::clock;

use super::harness::{Swarm, has_config, put_config, wait_version, within};
use crate::consensus::membership::Error;
use crate::consensus::{Compaction, Consensus, MemberRole};
use crate::join::new_node;

fn voters(manager: &Consensus) -> Vec<u64> {
    let members = manager.members().into_iter();
    members.filter(|m| m.role == MemberRole::Voter).map(|m| m.raft_id).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn managers_are_added_moved_and_removed_through_any_manager() {
    let mut swarm = Swarm::of(2).await;
    let leader = swarm.leader(None).await;
    let follower = swarm.get(3 - leader).clone();
    swarm.start(3).await;
    within("adding", follower.add_manager(3, "addr-3")).await.unwrap();
    within("adding again", follower.add_manager(3, "addr-3")).await.unwrap();
    assert_eq!(voters(swarm.get(leader)), [1, 2, 3]);

    swarm.net.move_to(3, "elsewhere");
    within("moving", follower.add_manager(3, "elsewhere")).await.unwrap();
    let members = swarm.get(leader).members();
    assert_eq!((members.len(), members[2].addr.as_str()), (3, "elsewhere"));
    assert_eq!(members[2].role, MemberRole::Voter);
    swarm.converge().await;

    within("removing", follower.remove_manager(3)).await.unwrap();
    within("removing again", follower.remove_manager(3)).await.unwrap();
    assert_eq!(voters(swarm.get(leader)), [1, 2]);
    assert_eq!(swarm.get(leader).members().len(), 2);
    swarm.kill(3).await;
    within("a write", follower.propose(&put_config(1, 10))).await.unwrap();
    swarm.converge().await;
    swarm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_takes_out_a_member_that_no_node_names_and_no_other() {
    let swarm = Swarm::of(3).await;
    let number = swarm.leader(None).await;
    let leader = swarm.get(number);
    let leads = within("the lead", async {
        leader.leadership().wait_for(|leadership| leadership.is_self).await.map(drop)
    });
    leads.await.unwrap();
    let others: Vec<u64> = swarm.ids().into_iter().filter(|id| *id != number).collect();
    let mut node =
        new_node(NodeId(1), NodeRole::Manager, Availability::Active, "10.0.0.1:1").unwrap();
    node.manager_status = Some(ManagerStatus { raft_id: others[0], ..ManagerStatus::default() });
    let object = Object::Node(Box::new(node));
    let put = Action::Put { object, expect: Expect::Absent };
    let named = within("a write", leader.propose(&Command::new(clock::now(), vec![put]))).await;
    assert!(matches!(named, Ok(Outcome::Applied(_))), "{named:?}");

    assert_eq!(within("a look", leader.remove_unnamed(others[0])).await, Ok(false));
    assert_eq!(within("a look", leader.remove_unnamed(number)).await, Ok(false), "it leads");
    let elsewhere = within("an answer", swarm.get(others[0]).remove_unnamed(others[1])).await;
    assert!(matches!(elsewhere, Err(Error::NoLeader { .. })), "{elsewhere:?}");
    assert_eq!(voters(leader).len(), 3);
    let known = leader.members();
    assert_eq!(within("taking out", leader.remove_unnamed(others[1])).await, Ok(true));
    assert!(within("the change", leader.members_changed(&known)).await);
    assert_eq!(within("taking out again", leader.remove_unnamed(others[1])).await, Ok(true));
    assert!(!voters(leader).contains(&others[1]) && voters(leader).len() == 2);
    swarm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_two_managers_announces_that_it_has_moved() {
    let swarm = Swarm::of(2).await;
    let leader = swarm.leader(None).await;
    let moved = 3 - leader;
    swarm.net.move_to(moved, "elsewhere");
    within("moving", swarm.get(moved).add_manager(moved, "elsewhere")).await.unwrap();
    within("a write", swarm.get(leader).propose(&put_config(1, 10))).await.unwrap();
    assert!(has_config(&swarm.converge().await, 1));
    swarm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_is_removed_hands_over_and_the_last_voter_stays() {
    let mut swarm = Swarm::of(3).await;
    let old = swarm.leader(None).await;
    within("removing", swarm.get(old).remove_manager(old)).await.unwrap();
    let new = swarm.leader(Some(old)).await;
    within("a write", swarm.get(new).propose(&put_config(1, 10))).await.unwrap();
    assert!(!voters(swarm.get(new)).contains(&old));
    swarm.kill(old).await;
    let other = swarm.ids().into_iter().find(|id| *id != new).unwrap();
    within("removing", swarm.get(new).remove_manager(other)).await.unwrap();
    swarm.kill(other).await;
    let leader = swarm.leader(None).await;
    let error = within("an answer", swarm.get(leader).remove_manager(leader)).await.unwrap_err();
    assert!(matches!(error, Error::Refused { .. }), "{error}");
    within("a write", swarm.get(leader).propose(&put_config(2, 10))).await.unwrap();
    swarm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manager_that_does_not_answer_gets_no_vote_and_stops_nobody() {
    let mut swarm = Swarm::empty();
    let mut options = swarm.options(1);
    options.timing.catch_up = Duration::from_millis(700);
    swarm.insert(Consensus::start(options).await.unwrap());
    swarm.get(1).bootstrap("addr-1").await.unwrap();
    swarm.leader(None).await;
    let error = within("an answer", swarm.get(1).add_manager(9, "nowhere")).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("manager 9") && text.contains("not caught up"), "{text}");
    assert_eq!(voters(swarm.get(1)), [1]);
    within("a write", swarm.get(1).propose(&put_config(1, 10))).await.unwrap();
    within("removing", swarm.get(1).remove_manager(9)).await.unwrap();
    assert_eq!(swarm.get(1).members().len(), 1);
    swarm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manager_that_was_away_for_20000_writes_rejoins_by_snapshot() {
    let mut swarm = Swarm::empty();
    swarm.compaction = Compaction { entries: 2000, keep: 100 };
    swarm.found(3).await;
    let leader = swarm.leader(None).await;
    let away = swarm.ids().into_iter().find(|id| *id != leader).unwrap();
    swarm.get(leader).propose(&put_config(0, 10)).await.unwrap();
    swarm.kill(away).await;
    let survivor = swarm.ids()[0];
    for chunk in 0..40_u64 {
        let numbers = chunk * 500 + 1..=chunk * 500 + 500;
        let commands: Vec<_> = numbers.map(|number| put_config(number, 20)).collect();
        let writes = commands.iter().map(|command| swarm.get(survivor).propose(command));
        for outcome in within("writes", futures::future::join_all(writes)).await {
            outcome.unwrap();
        }
    }
    let before = swarm.net.n_calls("snapshot");
    swarm.start(away).await;
    let state = swarm.converge().await;
    assert!(swarm.net.n_calls("snapshot") > before, "the log it needs is gone");
    assert_eq!(state.configs().len(), 20_001);
    let status = swarm.get(away).status().await;
    assert!(status.purged.unwrap() > 10_000, "{status:?}");

    // What it got by snapshot survives its next crash.
    swarm.kill(away).await;
    swarm.start(away).await;
    within("replay", wait_version(swarm.get(away), state.version().index)).await;
    assert!(has_config(&swarm.get(away).state(), 20_000));
    swarm.converge().await;
    swarm.stop().await;
}
