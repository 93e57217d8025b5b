//! Identifiers: 128 random bits, written as 25 characters of base 36.
//!
//! The form is Docker's (SwarmKit `identity/randomid.go`), so that its clients recognise and
//! abbreviate the ids. One type per noun: a task id cannot be passed where a node id is meant.

use std::fmt;
use std::str::FromStr;

/// Characters of an id in base 36.
pub const ID_LENGTH: usize = 25;

/// Why a text is not an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not an id: expected 25 characters of 0-9 and a-z")]
pub struct ParseError {
    /// The text that was given.
    pub text: String,
}

fn write_base36(mut value: u128, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let mut text = [b'0'; ID_LENGTH];
    for slot in text.iter_mut().rev() {
        let digit = (value % 36) as u8;
        *slot = if digit < 10 { b'0' + digit } else { b'a' + digit - 10 };
        value /= 36;
    }
    f.pad(std::str::from_utf8(&text).expect("base-36 digits are ASCII"))
}

fn parse_base36(text: &str) -> Option<u128> {
    if text.len() != ID_LENGTH {
        return None;
    }
    text.bytes().try_fold(0u128, |value, byte| {
        let digit = match byte {
            b'0'..=b'9' => byte - b'0',
            b'a'..=b'z' => byte - b'a' + 10,
            _ => return None,
        };
        value.checked_mul(36)?.checked_add(u128::from(digit))
    })
}

macro_rules! id_types {
    ($($(#[$doc:meta])* $name:ident)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u128);

        impl $name {
            /// Draws a fresh id.
            pub fn random(rng: &mut impl rand::Rng) -> Self {
                let (high, low) = (rng.next_u64(), rng.next_u64());
                Self(u128::from(high) << 64 | u128::from(low))
            }

            /// The first 12 characters, as Docker's lists abbreviate ids.
            pub fn short(&self) -> String {
                let mut text = self.to_string();
                text.truncate(12);
                text
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write_base36(self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write_base36(self.0, f)
            }
        }

        impl FromStr for $name {
            type Err = ParseError;
            fn from_str(text: &str) -> Result<Self, ParseError> {
                parse_base36(text).map(Self).ok_or_else(|| ParseError { text: text.into() })
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}

id_types! {
    /// The swarm itself; the `O` of every certificate.
    ClusterId
    /// A machine; the `CN` of its certificate.
    NodeId
    /// A service.
    ServiceId
    /// A task: one attempt to run one container.
    TaskId
    /// A network.
    NetworkId
    /// A secret.
    SecretId
    /// A config.
    ConfigId
    /// A stack.
    StackId
    /// The record of an image's name and holders.
    ImageId
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_reads_back_as_it_was_written() {
        for value in [0, 1, 35, 36, u128::MAX] {
            let id = TaskId(value);
            assert_eq!(id.to_string().len(), ID_LENGTH);
            assert_eq!(id.to_string().parse(), Ok(id));
            let json = serde_json::to_string(&id).unwrap();
            assert_eq!(serde_json::from_str::<TaskId>(&json).unwrap(), id);
        }
    }

    #[test]
    fn what_is_no_id_is_refused() {
        for text in ["", "abc", "ZZZZZZZZZZZZZZZZZZZZZZZZZ", "zzzzzzzzzzzzzzzzzzzzzzzzz"] {
            assert!(text.parse::<NodeId>().is_err(), "{text}");
        }
    }
}
