//! Join tokens: `SWMTKN-1-<digest of the root>-<secret>`, as Docker writes them.
//!
//! The digest pins the root certificate, so that a joiner never sends its secret to an impostor; which
//! of the two secrets it is decides the role.

use std::fmt;
use std::str::FromStr;

use ring::rand::SecureRandom as _;
use sha2::{Digest as _, Sha256};

/// Characters of a SHA-256 in base 36.
const DIGEST_LENGTH: usize = 50;
/// Characters of 16 random bytes in base 36.
const SECRET_LENGTH: usize = 25;

/// Why a text is no join token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "invalid join token: {why}; a token looks like SWMTKN-1-<50 characters>-<25 characters>: copy it whole from `skep swarm join-token worker` on a manager"
)]
pub struct TokenError {
    why: String,
}

/// A join token.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// SHA-256 of the root certificate (DER) in base 36.
    pub root_digest: String,
    /// 25 characters.
    pub secret: String,
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SWMTKN-1-{}-…", self.root_digest)
    }
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SWMTKN-1-{}-{}", self.root_digest, self.secret)
    }
}

impl FromStr for JoinToken {
    type Err = TokenError;
    fn from_str(text: &str) -> Result<Self, TokenError> {
        let refuse = |why: &str| Err(TokenError { why: why.to_owned() });
        let parts: Vec<&str> = text.trim().split('-').collect();
        let [prefix, version, digest, secret] = parts.as_slice() else {
            return refuse(&format!("it has {} parts between dashes, not 4", parts.len()));
        };
        let base36 =
            |part: &str| part.bytes().all(|b| b.is_ascii_digit() || b.is_ascii_lowercase());
        if *prefix != "SWMTKN" {
            return refuse("it does not begin with SWMTKN");
        }
        if *version != "1" {
            return refuse(&format!("its version is {version}, not 1"));
        }
        if digest.len() != DIGEST_LENGTH || !base36(digest) {
            return refuse("its third part is not 50 characters of 0-9 and a-z");
        }
        if secret.len() != SECRET_LENGTH || !base36(secret) {
            return refuse("its fourth part is not 25 characters of 0-9 and a-z");
        }
        Ok(Self { root_digest: (*digest).to_owned(), secret: (*secret).to_owned() })
    }
}

/// A fresh secret of 16 random bytes.
pub fn new_secret() -> String {
    let mut bytes = [0u8; 16];
    ring::rand::SystemRandom::new().fill(&mut bytes).expect("the kernel gives random bytes");
    base36(&bytes, SECRET_LENGTH)
}

/// What a token says of a root certificate.
pub fn root_digest(root_pem: &str) -> Result<String, super::Error> {
    let der = super::pem_to_der("root certificate", root_pem)?;
    Ok(base36(&Sha256::digest(der), DIGEST_LENGTH))
}

/// Big-endian bytes as base 36, padded with zeros to `length`.
fn base36(bytes: &[u8], length: usize) -> String {
    let mut digits = vec![0u8; length];
    for byte in bytes {
        let mut carry = u32::from(*byte);
        for digit in digits.iter_mut().rev() {
            let value = u32::from(*digit) * 256 + carry;
            *digit = (value % 36) as u8;
            carry = value / 36;
        }
    }
    digits.iter().map(|d| char::from_digit(u32::from(*d), 36).expect("below 36")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_reads_back_and_a_damaged_one_is_refused() {
        let token =
            JoinToken { root_digest: base36(&[255; 32], DIGEST_LENGTH), secret: new_secret() };
        assert_eq!(token.to_string().parse(), Ok(token.clone()));
        for (text, why) in [
            ("", "1 parts"),
            ("SWMTKN-1-abc", "3 parts"),
            ("TOKEN-1-a-b", "begin with SWMTKN"),
            ("SWMTKN-2-a-b", "version is 2"),
            ("SWMTKN-1-a-b", "third part"),
        ] {
            let error = text.parse::<JoinToken>().unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
        let cut = &token.to_string()[..80];
        assert!(cut.parse::<JoinToken>().unwrap_err().to_string().contains("fourth part"));
    }
}
