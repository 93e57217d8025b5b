//! An atomic batch of changes to nftables.

use std::time::Duration;

use netlink_packet_core::{NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST};

use super::attribute::Attributes;
use super::expression::Expression;
use super::uapi::*;
use crate::net::channel::push_message;

/// Elements in one message: an attribute holds under 64 KiB, an element of ours under 80 bytes.
const ELEMENTS_PER_MESSAGE: usize = 500;

/// The name that the kernel numbers anonymous maps from.
const ANONYMOUS_MAP: &str = "__map%d";

/// What packets the tables see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Family {
    /// IPv4.
    #[default]
    Ipv4,
    /// IPv6.
    Ipv6,
    /// IPv4 and IPv6.
    Inet,
}

impl Family {
    pub(super) fn number(self) -> u8 {
        match self {
            Self::Ipv4 => NFPROTO_IPV4,
            Self::Ipv6 => NFPROTO_IPV6,
            Self::Inet => NFPROTO_INET,
        }
    }
}

/// Where a base chain is hooked into the path of packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hook {
    /// `filter` or `nat`.
    pub kind: &'static str,
    /// The hook's number: 0 prerouting, 1 input, 2 forward, 3 output, 4 postrouting.
    pub number: u32,
    /// Lower comes earlier.
    pub priority: i32,
    /// Whether packets that no rule decides on are dropped.
    pub drops_by_default: bool,
}

/// What a set's keys are, and what a map's values are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SetKind {
    /// The data type of keys, as `nft` numbers them; a concatenation packs 6 bits each.
    pub key_type: u32,
    /// The length of a key in bytes.
    pub key_length: u32,
    /// Whether keys are numbers of the host's byte order.
    pub is_host_order: bool,
    /// What the keys map to, if this is a map.
    pub value: Value,
}

/// What a set's keys map to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Value {
    /// Nothing: a plain set.
    None,
    /// A verdict.
    Verdict,
    /// Data of a type and length.
    Data {
        /// The data type, as `nft` numbers them.
        kind: u32,
        /// The length in bytes.
        length: u32,
        /// Whether they are numbers of the host's byte order.
        is_host_order: bool,
    },
}

/// An element of a set or map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Element {
    key: Vec<u8>,
    value: Option<Attributes>,
}

impl Element {
    /// An element of a plain set, or one that is to be deleted.
    pub fn key(key: impl Into<Vec<u8>>) -> Self {
        Self { key: key.into(), value: None }
    }

    /// An element of a map to data.
    pub fn data(key: impl Into<Vec<u8>>, value: &[u8]) -> Self {
        let value = Attributes::new().raw(NFTA_DATA_VALUE, value);
        Self { key: key.into(), value: Some(value) }
    }

    /// An element of a map to verdicts: go to `chain`.
    pub fn goto(key: impl Into<Vec<u8>>, chain: &str) -> Self {
        Self { key: key.into(), value: Some(super::expression::goto(chain)) }
    }

    fn encode(&self) -> Attributes {
        let key = Attributes::new().raw(NFTA_DATA_VALUE, &self.key);
        let element = Attributes::new().nested(NFTA_SET_ELEM_KEY, &key);
        match &self.value {
            Some(value) => element.nested(NFTA_SET_ELEM_DATA, value),
            None => element,
        }
    }
}

struct Message {
    family: Family,
    kind: u16,
    flags: u16,
    label: String,
    body: Attributes,
}

/// Changes to tables that the kernel carries out together or not at all.
#[derive(Default)]
pub struct Batch {
    family: Family,
    messages: Vec<Message>,
    n_maps: u32,
}

impl std::fmt::Debug for Batch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.messages.iter().map(|message| &message.label)).finish()
    }
}

impl Batch {
    /// A batch without changes, of IPv4 tables.
    pub fn new() -> Self {
        Self::default()
    }

    /// A batch without changes, of the tables of `family`.
    pub fn of(family: Family) -> Self {
        Self { family, ..Self::default() }
    }

    /// Has the changes that follow be of the tables of another family.
    pub fn turn_to(&mut self, family: Family) {
        self.family = family;
    }

    /// Whether there is nothing to change.
    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// The number of messages.
    pub fn len(&self) -> usize {
        self.messages.len()
    }

    /// What the message at `index` does; completes "failed to …".
    pub fn label(&self, index: usize) -> &str {
        self.messages.get(index).map_or("begin a batch", |message| &message.label)
    }

    fn push(&mut self, kind: u16, flags: u16, label: String, body: Attributes) {
        self.messages.push(Message { family: self.family, kind, flags, label, body });
    }

    /// Adds a table; one that exists is fine.
    pub fn add_table(&mut self, table: &str) {
        let body = Attributes::new().text(NFTA_TABLE_NAME, table).be32(NFTA_TABLE_FLAGS, 0);
        self.push(NFT_MSG_NEWTABLE, NLM_F_CREATE, format!("add table {table}"), body);
    }

    /// Deletes a table with everything in it.
    pub fn delete_table(&mut self, table: &str) {
        let body = Attributes::new().text(NFTA_TABLE_NAME, table);
        self.push(NFT_MSG_DELTABLE, 0, format!("delete table {table}"), body);
    }

    /// Adds a chain, a base chain where it has a hook.
    pub fn add_chain(&mut self, table: &str, chain: &str, hook: Option<&Hook>) {
        let mut body = Attributes::new();
        body = body.text(NFTA_CHAIN_TABLE, table).text(NFTA_CHAIN_NAME, chain);
        if let Some(hook) = hook {
            let place = Attributes::new().be32(NFTA_HOOK_HOOKNUM, hook.number);
            let place = place.raw(NFTA_HOOK_PRIORITY, &hook.priority.to_be_bytes());
            body = body.nested(NFTA_CHAIN_HOOK, &place).text(NFTA_CHAIN_TYPE, hook.kind);
            body = body.be32(NFTA_CHAIN_POLICY, u32::from(!hook.drops_by_default));
        }
        let label = format!("add chain {table} {chain}");
        self.push(NFT_MSG_NEWCHAIN, NLM_F_CREATE | NLM_F_EXCL, label, body);
    }

    /// Deletes all rules of a chain.
    pub fn flush_chain(&mut self, table: &str, chain: &str) {
        let body = Attributes::new().text(NFTA_RULE_TABLE, table).text(NFTA_RULE_CHAIN, chain);
        self.push(NFT_MSG_DELRULE, 0, format!("flush chain {table} {chain}"), body);
    }

    /// Deletes a chain that has no rules and that nothing refers to.
    pub fn delete_chain(&mut self, table: &str, chain: &str) {
        let body = Attributes::new().text(NFTA_CHAIN_TABLE, table).text(NFTA_CHAIN_NAME, chain);
        self.push(NFT_MSG_DELCHAIN, 0, format!("delete chain {table} {chain}"), body);
    }

    /// Appends a rule to a chain.
    pub fn add_rule(&mut self, table: &str, chain: &str, rule: &[Expression], comment: &str) {
        let label = format!("add rule \"{comment}\" to {table} {chain}");
        let flags = NLM_F_CREATE | NLM_F_APPEND;
        self.push(NFT_MSG_NEWRULE, flags, label, rule_body(table, chain, rule, comment));
    }

    /// Puts a rule before all others of a chain.
    pub fn insert_rule(&mut self, table: &str, chain: &str, rule: &[Expression], comment: &str) {
        let label = format!("insert rule \"{comment}\" into {table} {chain}");
        self.push(NFT_MSG_NEWRULE, NLM_F_CREATE, label, rule_body(table, chain, rule, comment));
    }

    /// Deletes one rule.
    pub fn delete_rule(&mut self, table: &str, chain: &str, handle: u64) {
        let body = Attributes::new().text(NFTA_RULE_TABLE, table).text(NFTA_RULE_CHAIN, chain);
        let label = format!("delete rule {handle} of {table} {chain}");
        self.push(NFT_MSG_DELRULE, 0, label, body.be64(NFTA_RULE_HANDLE, handle));
    }

    /// Adds a set or map.
    pub fn add_set(&mut self, table: &str, set: &str, kind: &SetKind) {
        self.n_maps += 1;
        let body = set_body(table, set, kind, 0, self.n_maps);
        let label = format!("add set {table} {set}");
        self.push(NFT_MSG_NEWSET, NLM_F_CREATE | NLM_F_EXCL, label, body);
    }

    /// Adds a set that rules put elements into, `size` at most, each with what the rule keeps of it.
    pub fn add_dynamic_set(&mut self, table: &str, set: &str, kind: &SetKind, size: u32) {
        self.n_maps += 1;
        let size = Attributes::new().be32(NFTA_SET_DESC_SIZE, size);
        let body = set_body(table, set, kind, NFT_SET_EVAL, self.n_maps);
        let label = format!("add set {table} {set}");
        let body = body.nested(NFTA_SET_DESC, &size);
        self.push(NFT_MSG_NEWSET, NLM_F_CREATE | NLM_F_EXCL, label, body);
    }

    /// Adds a set that rules put elements into, `size` at most, each of which goes when no rule has put it
    /// there for as long as `timeout`.
    pub fn add_expiring_set(
        &mut self,
        table: &str,
        set: &str,
        kind: &SetKind,
        size: u32,
        timeout: Duration,
    ) {
        self.n_maps += 1;
        let size = Attributes::new().be32(NFTA_SET_DESC_SIZE, size);
        let milliseconds = u64::try_from(timeout.as_millis()).expect("timeouts are short");
        let body = set_body(table, set, kind, NFT_SET_EVAL | NFT_SET_TIMEOUT, self.n_maps);
        let body = body.nested(NFTA_SET_DESC, &size).be64(NFTA_SET_TIMEOUT, milliseconds);
        let label = format!("add set {table} {set}");
        self.push(NFT_MSG_NEWSET, NLM_F_CREATE | NLM_F_EXCL, label, body);
    }

    /// Adds an anonymous, constant map, which lives and dies with the one rule that uses it.
    ///
    /// Returns the name and id that the rule refers to it by, within this batch.
    pub fn add_anonymous_map(
        &mut self,
        table: &str,
        kind: &SetKind,
        elements: &[Element],
    ) -> (&'static str, u32) {
        self.n_maps += 1;
        let id = self.n_maps;
        let size = u32::try_from(elements.len()).expect("a map has under 2^32 elements");
        let flags = NFT_SET_ANONYMOUS | NFT_SET_CONSTANT;
        let size = Attributes::new().be32(NFTA_SET_DESC_SIZE, size);
        let body = set_body(table, ANONYMOUS_MAP, kind, flags, id).nested(NFTA_SET_DESC, &size);
        let label = format!("add an anonymous map to {table}");
        self.push(NFT_MSG_NEWSET, NLM_F_CREATE | NLM_F_EXCL, label, body);
        self.change_elements(NFT_MSG_NEWSETELEM, table, ANONYMOUS_MAP, elements, Some(id));
        (ANONYMOUS_MAP, id)
    }

    /// Adds elements to a set or map; one that exists already is an error.
    pub fn add_elements(&mut self, table: &str, set: &str, elements: &[Element]) {
        self.change_elements(NFT_MSG_NEWSETELEM, table, set, elements, None);
    }

    /// Deletes elements of a set or map.
    pub fn delete_elements(&mut self, table: &str, set: &str, elements: &[Element]) {
        self.change_elements(NFT_MSG_DELSETELEM, table, set, elements, None);
    }

    fn change_elements(
        &mut self,
        kind: u16,
        table: &str,
        set: &str,
        elements: &[Element],
        id: Option<u32>,
    ) {
        let (verb, flags) = match kind {
            NFT_MSG_DELSETELEM => ("delete", 0),
            _ => ("add", NLM_F_CREATE | NLM_F_EXCL),
        };
        for chunk in elements.chunks(ELEMENTS_PER_MESSAGE) {
            let list = chunk.iter().fold(Attributes::new(), |list, element| {
                list.nested(NFTA_LIST_ELEM, &element.encode())
            });
            let mut body = Attributes::new().text(NFTA_SET_ELEM_LIST_TABLE, table);
            body = body.text(NFTA_SET_ELEM_LIST_SET, set);
            if let Some(id) = id {
                body = body.be32(NFTA_SET_ELEM_LIST_SET_ID, id);
            }
            let label = format!("{verb} {} elements of {table} {set}", chunk.len());
            self.push(kind, flags, label, body.nested(NFTA_SET_ELEM_LIST_ELEMENTS, &list));
        }
    }

    /// The batch as the kernel reads it. The message at index `i` has the sequence number
    /// `sequence + 1 + i`; `sequence` itself is the batch's.
    pub(super) fn encode(&self, sequence: u32, generation: Option<u32>) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut begin = header(NFPROTO_UNSPEC, NFNL_SUBSYS_NFTABLES).to_vec();
        if let Some(generation) = generation {
            let attribute = Attributes::new().be32(NFNL_BATCH_GENID, generation);
            begin.extend(attribute.as_bytes());
        }
        push_message(&mut bytes, NFNL_MSG_BATCH_BEGIN, NLM_F_REQUEST, sequence, &begin);
        let mut sequence = sequence;
        for message in &self.messages {
            sequence = sequence.wrapping_add(1);
            let kind = NFNL_SUBSYS_NFTABLES << 8 | message.kind;
            let mut body = header(message.family.number(), 0).to_vec();
            body.extend(message.body.as_bytes());
            let flags = NLM_F_REQUEST | NLM_F_ACK | message.flags;
            push_message(&mut bytes, kind, flags, sequence, &body);
        }
        let end = header(NFPROTO_UNSPEC, NFNL_SUBSYS_NFTABLES);
        push_message(&mut bytes, NFNL_MSG_BATCH_END, NLM_F_REQUEST, sequence.wrapping_add(1), &end);
        bytes
    }
}

/// `struct nfgenmsg`.
pub(super) fn header(family: u8, resource: u16) -> [u8; 4] {
    let [high, low] = resource.to_be_bytes();
    [family, NFNETLINK_V0, high, low]
}

fn rule_body(table: &str, chain: &str, rule: &[Expression], comment: &str) -> Attributes {
    let list = rule.iter().fold(Attributes::new(), |list, Expression(expression)| {
        list.nested(NFTA_LIST_ELEM, expression)
    });
    let mut user_data = vec![NFTNL_UDATA_RULE_COMMENT];
    user_data.push(u8::try_from(comment.len() + 1).expect("comments are short"));
    user_data.extend(comment.as_bytes());
    user_data.push(0);
    let body = Attributes::new().text(NFTA_RULE_TABLE, table).text(NFTA_RULE_CHAIN, chain);
    body.nested(NFTA_RULE_EXPRESSIONS, &list).raw(NFTA_RULE_USERDATA, &user_data)
}

fn set_body(table: &str, set: &str, kind: &SetKind, flags: u32, id: u32) -> Attributes {
    let map_flag = if kind.value == Value::None { 0 } else { NFT_SET_MAP };
    let mut body = Attributes::new()
        .text(NFTA_SET_TABLE, table)
        .text(NFTA_SET_NAME, set)
        .be32(NFTA_SET_FLAGS, flags | map_flag)
        .be32(NFTA_SET_KEY_TYPE, kind.key_type)
        .be32(NFTA_SET_KEY_LEN, kind.key_length)
        .be32(NFTA_SET_ID, id);
    match kind.value {
        Value::None => {}
        Value::Verdict => body = body.be32(NFTA_SET_DATA_TYPE, NFT_DATA_VERDICT),
        Value::Data { kind, length, .. } => {
            body = body.be32(NFTA_SET_DATA_TYPE, kind).be32(NFTA_SET_DATA_LEN, length);
        }
    }
    // For `nft list ruleset` alone: the kernel does not know byte orders. A verdict has none, and
    // nft aborts where it is given one.
    let order = |is_host_order| match is_host_order {
        true => BYTEORDER_HOST_ENDIAN,
        false => BYTEORDER_BIG_ENDIAN,
    };
    let mut orders = vec![(NFTNL_UDATA_SET_KEYBYTEORDER, order(kind.is_host_order))];
    if let Value::Data { is_host_order, .. } = kind.value {
        orders.push((NFTNL_UDATA_SET_DATABYTEORDER, order(is_host_order)));
    }
    let mut user_data = Vec::new();
    for (kind, order) in orders {
        user_data.extend([kind, 4]);
        user_data.extend(order.to_ne_bytes());
    }
    body.raw(NFTA_SET_USERDATA, &user_data)
}
