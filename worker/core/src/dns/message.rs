//! Messages of the domain name system: requests of containers, replies to them, and what others replied.
//!
//! Replies of other resolvers are passed on as they are, so that records nobody here knows pass too.

use std::net::IpAddr;

use hickory_proto::op::{Edns, Message, Metadata, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, PTR, SRV};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};

use super::{Answer, Kind, Location, Question};

const HEADER_BYTES: usize = 12;

/// What a datagram may have where its sender does not say (RFC 1035, 4.2.1).
const DATAGRAM_BYTES: u16 = 512;

/// What fits in one datagram, whatever its receiver would take: 65535 without the headers of IPv4 and UDP.
const DATAGRAM_BYTES_MAX: u16 = 65_507;

/// What we take in one datagram. Nothing on the way has a smaller one: the way is the loopback.
const PAYLOAD_BYTES: u16 = 4096;

/// Records that a request may have beside its question: EDNS and a signature.
const ADDITIONAL_MAX: u16 = 2;

/// The truncation bit in the third byte of a message.
const TRUNCATED: u8 = 0x02;
/// The response bit there.
const RESPONSE: u8 = 0x80;
/// The response code in the fourth byte.
const CODE_MASK: u8 = 0x0f;

const SERVFAIL: u8 = 2;
const NOTIMP: u8 = 4;
const REFUSED: u8 = 5;

/// How a request came, and its reply goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// One datagram.
    Udp,
    /// A stream, where a message has up to 65535 bytes.
    Tcp,
}

/// What became of a message that was received.
#[derive(Debug)]
pub enum Received {
    /// A question.
    Question(Request),
    /// No question of a kind that is answered; this reply says so.
    Wrong(Vec<u8>),
    /// Nothing that a reply belongs to.
    Nothing,
}

/// A request with one question.
#[derive(Debug, Clone)]
pub struct Request {
    message: Message,
    question: Question,
    transport: Transport,
}

impl Request {
    /// Reads what a container sent.
    pub fn read(bytes: &[u8], transport: Transport) -> Received {
        let Some(header) = bytes.first_chunk::<HEADER_BYTES>() else { return Received::Nothing };
        let count = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
        if header[2] & RESPONSE != 0 {
            return Received::Nothing;
        }
        let op_code = OpCode::from_u8((header[2] >> 3) & 0x0f);
        let wrong = |code| wrong(count(0), op_code, code);
        if op_code != OpCode::Query {
            return wrong(ResponseCode::NotImp);
        }
        // Looked at before the message is: room is made for as many records as it announces.
        if count(4) != 1 || count(6) != 0 || count(8) != 0 || count(10) > ADDITIONAL_MAX {
            return wrong(ResponseCode::FormErr);
        }
        let Ok(message) = Message::from_vec(bytes) else { return wrong(ResponseCode::FormErr) };
        let Some(query) = message.queries.first() else { return wrong(ResponseCode::FormErr) };
        if query.query_class != DNSClass::IN {
            return wrong(ResponseCode::NotImp);
        }
        let reversed = query.name.parse_arpa_name().ok();
        let question = Question { name: plain(&query.name), kind: kind(query), reversed };
        let request = Self { message, question, transport };
        if request.message.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
            return Received::Wrong(request.encode(&request.head(ResponseCode::BADVERS)));
        }
        Received::Question(request)
    }

    /// What is asked.
    pub fn question(&self) -> &Question {
        &self.question
    }

    /// The reply that says `answer`; `None` where the answer is to ask others.
    pub fn reply(&self, answer: &Answer) -> Option<Vec<u8>> {
        let code = match answer {
            Answer::Forward => return None,
            Answer::Refuse => ResponseCode::Refused,
            Answer::Unknown => ResponseCode::NXDomain,
            Answer::Addresses { .. } | Answer::Name(_) | Answer::Locations(_) => {
                ResponseCode::NoError
            }
        };
        let mut reply = self.head(code);
        let owner = &reply.queries[0].name;
        match answer {
            Answer::Addresses { addresses, ttl } => {
                let record = |address: &IpAddr| address_record(owner, *address, *ttl);
                reply.answers = addresses.iter().map(record).collect();
            }
            Answer::Name(name) => {
                let record = |name| Record::from_rdata(owner.clone(), 0, RData::PTR(PTR(name)));
                reply.answers = absolute(name).map(record).into_iter().collect();
            }
            Answer::Locations(places) => {
                (reply.answers, reply.additionals) = location_records(owner, places);
            }
            Answer::Unknown | Answer::Forward | Answer::Refuse => {}
        }
        self.shorten(&mut reply);
        Some(self.encode(&reply))
    }

    /// The reply that says that nobody could be asked in time.
    pub fn failure(&self) -> Vec<u8> {
        self.encode(&self.head(ResponseCode::ServFail))
    }

    /// The longest reply that its sender takes.
    pub fn limit(&self) -> usize {
        let asked = self.message.edns.as_ref().map_or(DATAGRAM_BYTES, Edns::max_payload);
        match self.transport {
            Transport::Udp => asked.clamp(DATAGRAM_BYTES, DATAGRAM_BYTES_MAX).into(),
            Transport::Tcp => u16::MAX.into(),
        }
    }

    /// A reply without records.
    fn head(&self, code: ResponseCode) -> Message {
        let mut reply = Message::response(self.message.id, OpCode::Query);
        reply.metadata = Metadata::response_from_request(&self.message.metadata);
        reply.metadata.recursion_available = true;
        reply.metadata.response_code = code;
        reply.queries.clone_from(&self.message.queries);
        if self.message.edns.is_some() {
            let mut edns = Edns::new();
            edns.set_max_payload(PAYLOAD_BYTES);
            reply.edns = Some(edns);
        }
        reply
    }

    /// Leaves out the records that the reply has no room for; a sender of a datagram then asks again by
    /// stream, or does with those that are there.
    ///
    /// Measured and not computed: the encoder stops to abbreviate names after some.
    fn shorten(&self, reply: &mut Message) {
        let fits = |records: &[Record], additionals: &[Record]| {
            let mut part = self.head(reply.metadata.response_code);
            part.answers = records.to_vec();
            part.additionals = additionals.to_vec();
            let bytes = self.encode(&part);
            // The encoder marks what it cut itself, at the size of the largest message.
            bytes.len() <= self.limit() && bytes[2] & TRUNCATED == 0
        };
        if fits(&reply.answers, &reply.additionals) {
            return;
        }
        // Nobody asked for these: a reply without them is whole.
        reply.additionals.clear();
        if fits(&reply.answers, &[]) {
            return;
        }
        let (mut fitting, mut too_many) = (0, reply.answers.len());
        while fitting + 1 < too_many {
            let middle = fitting.midpoint(too_many);
            if fits(&reply.answers[..middle], &[]) {
                fitting = middle;
            } else {
                too_many = middle;
            }
        }
        reply.answers.truncate(fitting);
        reply.metadata.truncation = self.transport == Transport::Udp;
    }

    fn encode(&self, reply: &Message) -> Vec<u8> {
        reply.to_vec().unwrap_or_else(|_| bare_failure(self.message.id))
    }
}

fn wrong(id: u16, op_code: OpCode, code: ResponseCode) -> Received {
    let reply = Message::error_msg(id, op_code, code);
    Received::Wrong(reply.to_vec().unwrap_or_else(|_| bare_failure(id)))
}

/// The shortest message that says that something failed.
fn bare_failure(id: u16) -> Vec<u8> {
    let [high, low] = id.to_be_bytes();
    vec![high, low, RESPONSE, SERVFAIL, 0, 0, 0, 0, 0, 0, 0, 0]
}

/// A name in lower case; one with bytes that no name of ours has becomes one that none of ours is.
fn plain(name: &Name) -> String {
    let label = |label: &[u8]| {
        let text = String::from_utf8_lossy(label).to_ascii_lowercase();
        text.replace('.', "\\.")
    };
    name.iter().map(label).collect::<Vec<_>>().join(".")
}

/// A name of ours as messages have it; a network's name may be none that a message can hold.
fn absolute(name: &str) -> Option<Name> {
    Name::from_ascii(format!("{name}.")).ok()
}

fn address_record(owner: &Name, address: IpAddr, ttl: u32) -> Record {
    let data = match address {
        IpAddr::V4(address) => RData::A(A(address)),
        IpAddr::V6(address) => RData::AAAA(AAAA(address)),
    };
    Record::from_rdata(owner.clone(), ttl, data)
}

/// Where tasks answer, and the addresses of their names.
fn location_records(owner: &Name, places: &[Location]) -> (Vec<Record>, Vec<Record>) {
    let (mut locations, mut addresses) = (Vec::new(), Vec::new());
    for place in places {
        let Some(target) = absolute(&place.target) else { continue };
        addresses
            .extend(place.addresses.iter().map(|address| address_record(&target, *address, 0)));
        // All alike: no priority, no weight.
        let data = RData::SRV(SRV::new(0, 0, place.port, target));
        locations.push(Record::from_rdata(owner.clone(), 0, data));
    }
    (locations, addresses)
}

#[expect(clippy::wildcard_enum_match_arm, reason = "there are a hundred types of records")]
fn kind(query: &Query) -> Kind {
    match query.query_type {
        RecordType::A => Kind::A,
        RecordType::AAAA => Kind::Aaaa,
        RecordType::PTR => Kind::Ptr,
        RecordType::SRV => Kind::Srv,
        _ => Kind::Other,
    }
}

/// A message with another id.
#[must_use]
pub fn with_id(mut message: Vec<u8>, id: u16) -> Vec<u8> {
    if let Some(place) = message.first_chunk_mut() {
        *place = id.to_be_bytes();
    }
    message
}

/// Whether `reply` answers `request`, message by message: its id, and its question in any case of letters.
pub fn answers(reply: &[u8], request: &[u8]) -> bool {
    let (Some(header), Some(end)) = (reply.first_chunk::<HEADER_BYTES>(), question_end(request))
    else {
        return false;
    };
    if header[2] & RESPONSE == 0 || request.first_chunk::<2>() != reply.first_chunk() {
        return false;
    }
    let question = &request[HEADER_BYTES..end];
    let is_repeated = reply
        .get(HEADER_BYTES..end)
        .is_some_and(|repeated| repeated.eq_ignore_ascii_case(question));
    // Some say no more than that they failed.
    let is_bare = header[4..6] == [0, 0] && header[3] & CODE_MASK != 0;
    is_repeated && header[4..6] == [0, 1] || is_bare
}

/// Whether a reply only says that its sender does not answer, so that another may be asked.
pub fn is_failure(reply: &[u8]) -> bool {
    reply.get(3).is_some_and(|byte| matches!(byte & CODE_MASK, SERVFAIL | NOTIMP | REFUSED))
}

/// A reply that fits `limit`: one that is longer loses its records, and says so.
#[must_use]
pub fn cut(mut reply: Vec<u8>, limit: usize) -> Vec<u8> {
    if reply.len() <= limit {
        return reply;
    }
    // A bare failure is short: this one repeats its question.
    let Some(end) = question_end(&reply) else { return reply };
    reply.truncate(end);
    reply[2] |= TRUNCATED;
    reply[6..HEADER_BYTES].fill(0);
    reply
}

/// Where the one question of a message ends.
fn question_end(message: &[u8]) -> Option<usize> {
    let mut at = HEADER_BYTES;
    loop {
        let length = usize::from(*message.get(at)?);
        at += 1 + length;
        match length {
            0 => break,
            1..64 => {}
            _ => return None, // The first name of a message points nowhere.
        }
    }
    at += 4;
    (at <= message.len()).then_some(at)
}
