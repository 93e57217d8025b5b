//! A manager that goes on alone with what it has, and those of before that meet it.

use skep_common::Timestamp;
use skep_manager_core::Command;

use super::harness::{Swarm, has_config, put_config, within};
use crate::consensus::anew::{Data, epoch, first_term};
use crate::consensus::{Consensus, DataKey, Options, StopReason};

const NOW: Timestamp = Timestamp::from_secs(1_700_000_000);

/// What manager 1 has, as the harness made it.
fn data(options: &Options) -> Data {
    Data { raft_id: options.raft_id, dir: options.dir.clone(), key: DataKey::new(1, [1; 32]) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manager_goes_on_alone_with_all_that_it_has_and_ends_a_majority_of_before() {
    let mut swarm = Swarm::of(3).await;
    swarm.leader(None).await;
    for number in 0..20 {
        within("a write", swarm.get(1).propose(&put_config(number, 100))).await.unwrap();
    }
    let before = swarm.converge().await;
    for raft_id in swarm.ids() {
        swarm.kill(raft_id).await;
    }

    let options = swarm.options(1);
    let (state, term) = data(&options).read().await.unwrap();
    assert!(state.version() >= before.version() && has_config(&state, 19));
    let mut new_options = swarm.options(9);
    let made = Data { raft_id: 9, dir: new_options.dir.clone(), key: DataKey::new(1, [9; 32]) };
    let first = first_term(term, NOW);
    made.write(&state, "addr-9", first).await.unwrap();

    new_options.raft_id = 9;
    swarm.insert(Consensus::start(new_options).await.unwrap());
    assert_eq!(swarm.leader(None).await, 9);
    let alone = within("a read", swarm.get(9).read_state()).await.unwrap();
    assert!(has_config(&alone, 19));
    assert_eq!(epoch(swarm.get(9).status().await.term), 1_700_000_000);
    assert_eq!(swarm.get(9).members().len(), 1);
    within("a write", swarm.get(9).propose(&put_config(78, 1))).await.unwrap();

    // It has the address of manager 1: two of three are there again, and would lead.
    swarm.net.stand_in(1, swarm.get(9));
    for raft_id in [2, 3] {
        swarm.start(raft_id).await;
    }
    // Who leads is told first. Its end makes the other one ask for votes.
    for _ in 0..2 {
        let former = swarm.ids().into_iter().filter(|raft_id| *raft_id != 9);
        let ends = former.map(|raft_id| {
            let manager = swarm.get(raft_id).clone();
            Box::pin(async move { (raft_id, manager.stopped().await) })
        });
        let any = futures::future::select_all(ends);
        let ((raft_id, stopped), ..) = within("the end of a former manager", any).await;
        swarm.kill(raft_id).await;
        assert!(matches!(stopped, StopReason::Superseded(_)), "{stopped}");
        let text = stopped.to_string();
        assert!(text.contains("2023-11-14T22:13:20Z") && text.contains("addr-1"), "{text}");
    }

    // Others join it, and what it is outlives its end.
    swarm.start(4).await;
    within("joining", swarm.get(9).add_manager(4, "addr-4")).await.unwrap();
    swarm.kill(9).await;
    swarm.start(9).await;
    let state = swarm.converge().await;
    assert!(has_config(&state, 78));
    swarm.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_not_known_to_be_committed_is_taken_in() {
    let mut swarm = Swarm::of(2).await;
    let leader = swarm.leader(None).await;
    within("a write", swarm.get(leader).propose(&put_config(1, 10))).await.unwrap();
    let other = swarm.ids().into_iter().find(|id| *id != leader).unwrap();
    swarm.kill(other).await;
    // The leader writes it down, and nobody acknowledges it.
    let manager = swarm.get(leader).clone();
    let last = manager.status().await.last_log_index;
    let command: Command = put_config(2, 10);
    let written = async {
        while swarm.get(leader).status().await.last_log_index == last {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        done = manager.propose(&command) => panic!("nobody else is there: {done:?}"),
        () = within("the entry", written) => {}
    }
    drop(manager);
    swarm.kill(leader).await;
    let options = swarm.options(leader);
    let key = DataKey::new(1, [u8::try_from(leader).unwrap(); 32]);
    let data = Data { raft_id: leader, dir: options.dir.clone(), key };
    let (state, _) = data.read().await.unwrap();
    assert!(has_config(&state, 1));
    assert!(has_config(&state, 2), "an entry of the own log");
}
