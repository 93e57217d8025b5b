//! The nfnetlink socket: commits batches and lists what is there.

use std::io;

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NLMSG_ERROR};
use netlink_sys::protocols::NETLINK_NETFILTER;

use super::attribute::{Attributes, be32, find};
use super::batch::{Batch, Family, header};
use super::read::{
    AgeRecord, ChainRecord, CountRecord, ElementRecord, MemberRecord, RuleRecord, SetRecord,
};
use super::uapi::*;
use crate::net::Error;
use crate::net::channel::{Channel, check_answer};

const ERESTART: i32 = 85;
const NFGEN_LENGTH: usize = 4;

/// Why a batch was not carried out. Nothing of it was.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// The rules changed since the generation that the batch names: observe and plan again.
    #[error("the rules changed since they were read")]
    Outdated,
    /// The kernel refused a message.
    #[error(transparent)]
    Refused(Error),
}

/// An nfnetlink socket in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct NftChannel {
    channel: Channel,
    /// The family whose tables are listed.
    family: Family,
}

impl NftChannel {
    /// Opens a channel to the IPv4 tables in the namespace of the calling thread.
    pub fn open() -> Result<Self, Error> {
        Self::open_of(Family::Ipv4)
    }

    /// Opens a channel to the tables of `family` in the namespace of the calling thread.
    pub fn open_of(family: Family) -> Result<Self, Error> {
        let channel = Channel::open(NETLINK_NETFILTER);
        let channel = channel.map_err(|e| Error::kernel("open an nftables netlink socket", e))?;
        Ok(Self { channel, family })
    }

    /// The generation of the namespace's rules; each commit of anyone adds one.
    pub fn generation(&mut self) -> Result<u32, Error> {
        let action = "read the generation of the nftables rules";
        let kind = NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETGEN;
        // This request is never acknowledged but by its answer, or by a refusal.
        let sequence = self.channel.next_sequence();
        let mut bytes = Vec::new();
        let body = header(NFPROTO_UNSPEC, 0);
        crate::net::channel::push_message(&mut bytes, kind, NLM_F_REQUEST, sequence, &body);
        self.channel.send(&bytes).map_err(|e| Error::kernel(action, e))?;
        loop {
            let frames = self.channel.receive().map_err(|e| Error::kernel(action, e))?;
            for frame in frames.iter().filter(|frame| frame.sequence == sequence) {
                if frame.kind == NLMSG_ERROR {
                    check_answer(frame).map_err(|refusal| Error::kernel(action, refusal))?;
                    continue;
                }
                let body = frame.payload.get(NFGEN_LENGTH..).unwrap_or_default();
                let generation = find(body, NFTA_GEN_ID).and_then(be32);
                let missing = || Error::kernel(action, io::Error::from(io::ErrorKind::InvalidData));
                return generation.ok_or_else(missing);
            }
        }
    }

    /// Carries out all changes of `batch` or none, whatever the rules are of.
    pub fn commit_any(&mut self, batch: &Batch) -> Result<(), Error> {
        match self.commit(batch, None) {
            Ok(()) => Ok(()),
            Err(CommitError::Refused(error)) => Err(error),
            Err(CommitError::Outdated) => unreachable!("the batch names no generation"),
        }
    }

    /// Carries out all changes of `batch` or none; none if the rules are no longer of
    /// `generation`.
    pub fn commit(&mut self, batch: &Batch, generation: Option<u32>) -> Result<(), CommitError> {
        let refused = |index: Option<usize>, refusal| {
            let label = index.map_or("commit the nftables batch", |index| batch.label(index));
            CommitError::Refused(Error::Kernel { action: label.to_owned(), source: refusal })
        };
        let first = self.channel.next_sequence();
        let bytes = batch.encode(first, generation);
        for _ in 0..=batch.len() {
            self.channel.next_sequence();
        }
        let sent = self.channel.reserve(bytes.len() * 2, batch.len());
        sent.and_then(|()| self.channel.send(&bytes)).map_err(|e| refused(None, e.into()))?;

        let mut pending = batch.len();
        let mut failure = None;
        while pending > 0 {
            let frames = self.channel.receive().map_err(|e| refused(None, e.into()))?;
            for frame in frames.iter().filter(|frame| frame.kind == NLMSG_ERROR) {
                let offset = frame.sequence.wrapping_sub(first) as usize;
                let answer = check_answer(frame);
                match offset.checked_sub(1) {
                    // The batch as a whole: nothing of it is answered after that.
                    None => match answer {
                        Err(refusal) if refusal.errno() == Some(ERESTART) => {
                            return Err(CommitError::Outdated);
                        }
                        Err(refusal) => return Err(refused(None, refusal)),
                        Ok(()) => {}
                    },
                    Some(index) if index < batch.len() => {
                        pending -= 1;
                        if let (Err(refusal), None) = (answer, &failure) {
                            failure = Some(refused(Some(index), refusal));
                        }
                    }
                    Some(_) => {} // The answer to an earlier batch that failed as a whole.
                }
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// All chains of the namespace, of the channel's family.
    pub fn chains(&mut self) -> Result<Vec<ChainRecord>, Error> {
        let bodies = self.dump(NFT_MSG_GETCHAIN, &Attributes::new(), "list chains")?;
        Ok(bodies.iter().filter_map(|body| ChainRecord::read(body)).collect())
    }

    /// The rules of one table, or of one chain of it, in their order.
    pub fn rules(&mut self, table: &str, chain: Option<&str>) -> Result<Vec<RuleRecord>, Error> {
        let mut filter = Attributes::new().text(NFTA_RULE_TABLE, table);
        if let Some(chain) = chain {
            filter = filter.text(NFTA_RULE_CHAIN, chain);
        }
        let bodies = self.dump(NFT_MSG_GETRULE, &filter, "list rules")?;
        Ok(bodies.iter().filter_map(|body| RuleRecord::read(body)).collect())
    }

    /// The sets and maps of one table.
    pub fn sets(&mut self, table: &str) -> Result<Vec<SetRecord>, Error> {
        let filter = Attributes::new().text(NFTA_SET_TABLE, table);
        let bodies = self.dump(NFT_MSG_GETSET, &filter, "list sets")?;
        Ok(bodies.iter().filter_map(|body| SetRecord::read(body)).collect())
    }

    /// The elements of one set or map.
    pub fn elements(&mut self, table: &str, set: &str) -> Result<Vec<ElementRecord>, Error> {
        let filter = Attributes::new().text(NFTA_SET_ELEM_LIST_TABLE, table);
        let filter = filter.text(NFTA_SET_ELEM_LIST_SET, set);
        let action = format!("list elements of {table} {set}");
        let bodies = self.dump(NFT_MSG_GETSETELEM, &filter, &action)?;
        Ok(bodies.iter().flat_map(|body| ElementRecord::read_all(body)).collect())
    }

    /// The elements of one set or map of anyone's, with the bounds of intervals.
    pub fn members(&mut self, table: &str, set: &str) -> Result<Vec<MemberRecord>, Error> {
        let filter = Attributes::new().text(NFTA_SET_ELEM_LIST_TABLE, table);
        let filter = filter.text(NFTA_SET_ELEM_LIST_SET, set);
        let action = format!("list elements of {table} {set}");
        let bodies = self.dump(NFT_MSG_GETSETELEM, &filter, &action)?;
        Ok(bodies.iter().flat_map(|body| MemberRecord::read_all(body)).collect())
    }

    /// The elements of one set that have a counter.
    pub fn counts(&mut self, table: &str, set: &str) -> Result<Vec<CountRecord>, Error> {
        let filter = Attributes::new().text(NFTA_SET_ELEM_LIST_TABLE, table);
        let filter = filter.text(NFTA_SET_ELEM_LIST_SET, set);
        let action = format!("list counters of {table} {set}");
        let bodies = self.dump(NFT_MSG_GETSETELEM, &filter, &action)?;
        Ok(bodies.iter().flat_map(|body| CountRecord::read_all(body)).collect())
    }

    /// The elements of one set whose elements expire.
    pub fn ages(&mut self, table: &str, set: &str) -> Result<Vec<AgeRecord>, Error> {
        let filter = Attributes::new().text(NFTA_SET_ELEM_LIST_TABLE, table);
        let filter = filter.text(NFTA_SET_ELEM_LIST_SET, set);
        let action = format!("list elements of {table} {set}");
        let bodies = self.dump(NFT_MSG_GETSETELEM, &filter, &action)?;
        Ok(bodies.iter().flat_map(|body| AgeRecord::read_all(body)).collect())
    }

    fn dump(
        &mut self,
        kind: u16,
        filter: &Attributes,
        action: &str,
    ) -> Result<Vec<Vec<u8>>, Error> {
        let mut body = header(self.family.number(), 0).to_vec();
        body.extend(filter.as_bytes());
        let kind = NFNL_SUBSYS_NFTABLES << 8 | kind;
        match self.channel.request(kind, NLM_F_REQUEST | NLM_F_DUMP, &body) {
            Ok(frames) => {
                let body =
                    |frame: crate::net::channel::Frame| frame.payload[NFGEN_LENGTH..].to_vec();
                let frames = frames.into_iter();
                Ok(frames.filter(|f| f.payload.len() >= NFGEN_LENGTH).map(body).collect())
            }
            Err(refusal) if refusal.errno() == Some(libc::ENOENT) => Ok(Vec::new()),
            Err(refusal) => Err(Error::kernel(action, refusal)),
        }
    }
}
