//! nftables through raw nfnetlink: batches of changes, and what is needed to read them back.
//!
//! A [`Batch`] is atomic: the kernel carries out all of its messages or none. Each message asks
//! for an acknowledgement and every acknowledgement is read, so that an error names the message it
//! belongs to. A batch may name the generation of the rules it was planned on; the kernel refuses
//! it if anyone changed any rule since.
//!
//! Source: `include/uapi/linux/netfilter/nf_tables.h` and `nfnetlink.h` of the kernel; the
//! encodings were compared with `nft --debug=netlink,mnl`.

mod attribute;
mod batch;
pub mod expression;
mod read;
mod socket;

pub use attribute::{Attributes, attributes, be32, be64, find, text};
pub use batch::{Batch, Element, Family, Hook, SetKind, Value};
pub use expression::Expression;
pub use read::{
    AgeRecord, ChainRecord, CountRecord, ElementRecord, MemberRecord, RuleRecord, SetRecord,
    VerdictRecord,
};
pub use socket::{CommitError, NftChannel};

/// Attribute and message numbers, named as in the kernel's headers.
#[expect(missing_docs, reason = "the kernel's headers are their documentation")]
pub mod uapi {
    pub const NFNETLINK_V0: u8 = 0;
    pub const NFNL_SUBSYS_NFTABLES: u16 = 10;
    pub const NFNL_MSG_BATCH_BEGIN: u16 = 16;
    pub const NFNL_MSG_BATCH_END: u16 = 17;
    pub const NFNL_BATCH_GENID: u16 = 1;
    pub const NFPROTO_UNSPEC: u8 = 0;
    pub const NFPROTO_INET: u8 = 1;
    pub const NFPROTO_IPV4: u8 = 2;
    pub const NFPROTO_IPV6: u8 = 10;

    pub const NFT_MSG_NEWTABLE: u16 = 0;
    pub const NFT_MSG_DELTABLE: u16 = 2;
    pub const NFT_MSG_NEWCHAIN: u16 = 3;
    pub const NFT_MSG_GETCHAIN: u16 = 4;
    pub const NFT_MSG_DELCHAIN: u16 = 5;
    pub const NFT_MSG_NEWRULE: u16 = 6;
    pub const NFT_MSG_GETRULE: u16 = 7;
    pub const NFT_MSG_DELRULE: u16 = 8;
    pub const NFT_MSG_NEWSET: u16 = 9;
    pub const NFT_MSG_GETSET: u16 = 10;
    pub const NFT_MSG_NEWSETELEM: u16 = 12;
    pub const NFT_MSG_GETSETELEM: u16 = 13;
    pub const NFT_MSG_DELSETELEM: u16 = 14;
    pub const NFT_MSG_GETGEN: u16 = 16;

    pub const NFTA_TABLE_NAME: u16 = 1;
    pub const NFTA_TABLE_FLAGS: u16 = 2;
    pub const NFTA_CHAIN_TABLE: u16 = 1;
    pub const NFTA_CHAIN_NAME: u16 = 3;
    pub const NFTA_CHAIN_HOOK: u16 = 4;
    pub const NFTA_CHAIN_POLICY: u16 = 5;
    pub const NFTA_CHAIN_TYPE: u16 = 7;
    pub const NFTA_HOOK_HOOKNUM: u16 = 1;
    pub const NFTA_HOOK_PRIORITY: u16 = 2;
    pub const NFTA_RULE_TABLE: u16 = 1;
    pub const NFTA_RULE_CHAIN: u16 = 2;
    pub const NFTA_RULE_HANDLE: u16 = 3;
    pub const NFTA_RULE_EXPRESSIONS: u16 = 4;
    pub const NFTA_RULE_USERDATA: u16 = 7;
    pub const NFTA_SET_TABLE: u16 = 1;
    pub const NFTA_SET_NAME: u16 = 2;
    pub const NFTA_SET_FLAGS: u16 = 3;
    pub const NFTA_SET_KEY_TYPE: u16 = 4;
    pub const NFTA_SET_KEY_LEN: u16 = 5;
    pub const NFTA_SET_DATA_TYPE: u16 = 6;
    pub const NFTA_SET_DATA_LEN: u16 = 7;
    pub const NFTA_SET_DESC: u16 = 9;
    pub const NFTA_SET_ID: u16 = 10;
    pub const NFTA_SET_TIMEOUT: u16 = 11;
    pub const NFTA_SET_USERDATA: u16 = 13;
    pub const NFTA_SET_DESC_SIZE: u16 = 1;
    pub const NFTA_SET_ELEM_LIST_TABLE: u16 = 1;
    pub const NFTA_SET_ELEM_LIST_SET: u16 = 2;
    pub const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
    pub const NFTA_SET_ELEM_LIST_SET_ID: u16 = 4;
    pub const NFTA_SET_ELEM_KEY: u16 = 1;
    pub const NFTA_SET_ELEM_DATA: u16 = 2;
    pub const NFTA_SET_ELEM_FLAGS: u16 = 3;
    pub const NFTA_SET_ELEM_EXPIRATION: u16 = 5;
    pub const NFTA_SET_ELEM_EXPR: u16 = 7;
    pub const NFTA_SET_ELEM_KEY_END: u16 = 10;
    pub const NFTA_SET_ELEM_EXPRESSIONS: u16 = 11;
    pub const NFTA_COUNTER_BYTES: u16 = 1;
    pub const NFTA_COUNTER_PACKETS: u16 = 2;
    pub const NFTA_LIST_ELEM: u16 = 1;
    pub const NFTA_EXPR_NAME: u16 = 1;
    pub const NFTA_EXPR_DATA: u16 = 2;
    pub const NFTA_DATA_VALUE: u16 = 1;
    pub const NFTA_DATA_VERDICT: u16 = 2;
    pub const NFTA_VERDICT_CODE: u16 = 1;
    pub const NFTA_VERDICT_CHAIN: u16 = 2;
    pub const NFTA_GEN_ID: u16 = 1;

    pub const NFT_SET_ANONYMOUS: u32 = 0x1;
    pub const NFT_SET_CONSTANT: u32 = 0x2;
    pub const NFT_SET_INTERVAL: u32 = 0x4;
    pub const NFT_SET_MAP: u32 = 0x8;
    pub const NFT_SET_TIMEOUT: u32 = 0x10;
    pub const NFT_SET_EVAL: u32 = 0x20;
    pub const NFT_SET_ELEM_INTERVAL_END: u32 = 0x1;
    pub const NFT_DATA_VERDICT: u32 = 0xffff_ff00;

    /// The comment's place in the user data of a rule (libnftnl `udata.h`).
    pub const NFTNL_UDATA_RULE_COMMENT: u8 = 0;
    pub const NFTNL_UDATA_SET_KEYBYTEORDER: u8 = 0;
    pub const NFTNL_UDATA_SET_DATABYTEORDER: u8 = 1;
    pub const BYTEORDER_HOST_ENDIAN: u32 = 1;
    pub const BYTEORDER_BIG_ENDIAN: u32 = 2;
}
