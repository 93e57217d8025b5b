//! A manager whose address has changed tells the others, so that they reach it again.

use std::time::Duration;

use futures::FutureExt as _;
use skep_common::NodeId;
use skep_manager_core::level::FORMAT_LEVEL;
use skep_runtime::transport::ChannelPool;

use crate::consensus::Consensus;
use crate::join::add_manager;
use crate::raft_rpc::ask_to_add;

/// Between attempts.
const RETRY: Duration = Duration::from_secs(1);

/// Has the managers know this one at `own`, for as long as it runs.
///
/// Either of two ways may be the only one: managers that cannot reach this one do not make it their leader while they
/// have another, which it asks; and of two, this one is elected, since it reaches the other.
pub(crate) async fn announce(
    consensus: Consensus,
    pool: ChannelPool,
    node_id: NodeId,
    own: String,
) {
    let raft_id = consensus.raft_id();
    let mut told = None;
    while consensus.is_known_elsewhere(&own).await {
        let others = consensus.members().into_iter().filter(|member| member.raft_id != raft_id);
        let others: Vec<String> = others.map(|member| member.addr).collect();
        let ways = [
            add_manager(&consensus, node_id, raft_id, &own, FORMAT_LEVEL).boxed(),
            ask_to_add(&pool, &others, raft_id, &own).boxed(),
        ];
        match futures::future::select_ok(ways).await {
            Ok(_) => tracing::info!(address = own, "the managers know this one at its new address"),
            Err(status) => {
                let why = status.message().to_owned();
                if told.as_ref() != Some(&why) {
                    tracing::warn!(
                        address = own,
                        why,
                        "no manager takes this one's new address yet; it is tried again"
                    );
                }
                told = Some(why);
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}
