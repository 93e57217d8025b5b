//! The unlock key: what a manager's key file is sealed with where managers start locked.
//!
//! Written as SwarmKit writes it: `SWMKEY-1-` and 32 bytes in Base64 without padding.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, Salt};
use ring::rand::{SecureRandom as _, SystemRandom};

const PREFIX: &str = "SWMKEY-1-";
const PURPOSE: &[u8] = b"skep manager key file";
const SALT_LENGTH: usize = 32;
const LENGTH: usize = 32;

/// A key that users keep, and type where a manager starts.
#[derive(Clone, PartialEq, Eq)]
pub struct UnlockKey([u8; LENGTH]);

/// The text is no unlock key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an unlock key is written SWMKEY-1- and 43 characters")]
pub struct UnlockKeyError;

impl UnlockKey {
    /// Draws a new key.
    pub fn generate() -> Self {
        let mut key = [0; LENGTH];
        SystemRandom::new().fill(&mut key).expect("the kernel gives random bytes");
        Self(key)
    }

    /// A key from the store.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, UnlockKeyError> {
        bytes.try_into().map(Self).map_err(|_| UnlockKeyError)
    }

    /// The key for the store.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.0.to_vec()
    }

    /// The key as users keep it.
    pub fn to_text(&self) -> String {
        format!("{PREFIX}{}", STANDARD_NO_PAD.encode(self.0))
    }

    /// Seals bytes: random salt, then what AES-256-GCM makes of them under a key of its own.
    pub(super) fn seal(&self, plain: &[u8]) -> Vec<u8> {
        let mut salt = [0; SALT_LENGTH];
        SystemRandom::new().fill(&mut salt).expect("the kernel gives random bytes");
        self.seal_salted(salt, plain)
    }

    pub(super) fn seal_salted(&self, salt: [u8; SALT_LENGTH], plain: &[u8]) -> Vec<u8> {
        let mut sealed = plain.to_vec();
        let (key, nonce) = self.key_of(&salt);
        key.seal_in_place_append_tag(nonce, Aad::empty(), &mut sealed)
            .expect("a key file is short enough to seal");
        [&salt[..], &sealed].concat()
    }

    /// Opens what [`Self::seal`] made; `None` where another key did.
    pub(super) fn open(&self, sealed: &[u8]) -> Option<Vec<u8>> {
        let (salt, sealed) = sealed.split_first_chunk::<SALT_LENGTH>()?;
        let (key, nonce) = self.key_of(salt);
        let mut bytes = sealed.to_vec();
        let plain = key.open_in_place(nonce, Aad::empty(), &mut bytes).ok()?;
        Some(plain.to_vec())
    }

    /// A key that seals once, with its nonce.
    fn key_of(&self, salt: &[u8; SALT_LENGTH]) -> (LessSafeKey, Nonce) {
        let secret = Salt::new(HKDF_SHA256, salt).extract(&self.0);
        let info = [PURPOSE];
        let output = secret.expand(&info, &AES_256_GCM).expect("32 bytes are within HKDF's limit");
        let key = LessSafeKey::new(UnboundKey::from(output));
        (key, Nonce::assume_unique_for_key([0; ring::aead::NONCE_LEN]))
    }
}

impl fmt::Debug for UnlockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("UnlockKey(…)")
    }
}

impl FromStr for UnlockKey {
    type Err = UnlockKeyError;

    fn from_str(text: &str) -> Result<Self, UnlockKeyError> {
        let encoded = text.trim().strip_prefix(PREFIX).ok_or(UnlockKeyError)?;
        let bytes = STANDARD_NO_PAD.decode(encoded).map_err(|_| UnlockKeyError)?;
        Self::from_bytes(&bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_reads_back_and_opens_what_it_sealed() {
        let (key, other) = (UnlockKey::generate(), UnlockKey::generate());
        let text = key.to_text();
        assert_eq!((text.len(), text.starts_with("SWMKEY-1-")), (52, true), "{text}");
        assert_eq!(format!(" {text}\n").parse(), Ok(key.clone()));
        for wrong in ["", "SWMKEY-1-", &text[1..], &text[..51], &text.replace("-1-", "-2-")] {
            assert_eq!(wrong.parse::<UnlockKey>(), Err(UnlockKeyError), "{wrong}");
        }
        let mut sealed = key.seal(b"plain");
        assert_ne!(sealed, key.seal(b"plain"), "each time under a key of its own");
        assert_eq!(key.open(&sealed).as_deref(), Some(&b"plain"[..]));
        assert_eq!(other.open(&sealed), None);
        *sealed.last_mut().unwrap() ^= 1;
        assert_eq!((key.open(&sealed), key.open(b"short")), (None, None));
    }
}
