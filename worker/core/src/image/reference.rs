//! Image names as users write them, and their one full form.
//!
//! `whoami`, `docker.io/whoami` and `docker.io/library/whoami:latest` are one image. Everything
//! that stores or compares a name uses the full form ([`Reference`]'s `Display`); everything that
//! shows one to a user uses [`Reference::familiar`].
//!
//! ```text
//! reference  = name [ ":" tag ] [ "@" digest ]
//! name       = [ domain "/" ] component { "/" component }
//! domain     = host [ ":" port ]          host: labels joined by ".", or "[" IPv6 "]"
//! component  = alnum { ("." | "_" | "__" | "-"+) alnum }     lower case only
//! tag        = [A-Za-z0-9_] up to 127 of [A-Za-z0-9_.-]
//! ```
//!
//! Source: `distribution/reference`, `reference.go`, `normalize.go` and `regexp.go`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::digest::{Digest, ParseDigestError};

/// The registry of a name that has none, and the account of an official image in it.
const DEFAULT_DOMAIN: &str = "docker.io";
const OFFICIAL_ACCOUNT: &str = "library";
/// What old clients call Docker Hub; it means [`DEFAULT_DOMAIN`].
const LEGACY_DOMAIN: &str = "index.docker.io";
const DEFAULT_TAG: &str = "latest";
/// Longest path of a repository: `RepositoryNameTotalLengthMax`.
const PATH_LEN_MAX: usize = 255;
const TAG_LEN_MAX: usize = 128;

/// A normalized image name. It has a tag or a digest, or both.
///
/// A name without either gets the tag `latest`; a name with a digest keeps exactly what it has.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    domain: String,
    path: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// Why a text is no image name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the message names every field")]
pub enum ParseReferenceError {
    /// Nothing, or nothing but a tag or a digest.
    #[error("image name \"{0}\" has no repository")]
    Empty(String),
    /// Docker refuses these too: they cannot be told from an image id.
    #[error("image name \"{0}\" cannot be 64 hexadecimal digits, because that is an image id")]
    Identifier(String),
    /// Remedy: write it in lower case.
    #[error("repository \"{0}\" of the image name must be lowercase")]
    Uppercase(String),
    /// A character or a separator that the grammar does not have.
    #[error("image name \"{name}\" is not valid: {part} \"{value}\" is not of the form {form}")]
    Grammar { name: String, part: &'static str, value: String, form: &'static str },
    /// No registry accepts it.
    #[error("repository \"{0}\" of the image name is longer than {PATH_LEN_MAX} characters")]
    TooLong(String),
    /// What stands after `@`.
    #[error("image name \"{name}\" has a digest that is not valid")]
    Digest { name: String, source: ParseDigestError },
}

impl Reference {
    /// The registry, such as `docker.io` or `registry.example:5000`.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// The repository within the registry, such as `library/whoami`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The tag, if it has one.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if it is pinned.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// The full name without tag and digest, such as `docker.io/library/whoami`.
    pub fn repository(&self) -> String {
        format!("{}/{}", self.domain, self.path)
    }

    /// The same name pinned to `digest`, as a service's image is stored.
    #[must_use]
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self { digest: Some(digest), ..self.clone() }
    }

    /// The name without its digest: the key under which a store knows the image.
    ///
    /// A name that had only a digest gets the tag `latest`, as every name without one does.
    #[must_use]
    pub fn without_digest(&self) -> Self {
        let tag = Some(self.tag.clone().unwrap_or_else(|| DEFAULT_TAG.to_owned()));
        Self { tag, digest: None, ..self.clone() }
    }

    /// The repository as a user writes it: without `docker.io/` and `library/`.
    pub fn familiar_repository(&self) -> String {
        if self.domain != DEFAULT_DOMAIN {
            return self.repository();
        }
        let short = match self.path.strip_prefix("library/") {
            // A deeper path keeps its account, or it would read as another one.
            Some(rest) if !rest.contains('/') => rest,
            _ => &self.path,
        };
        let is_ambiguous = Digest::from_hex(short).is_some()
            || short.split_once('/').is_some_and(|(first, _)| is_domain_like(first));
        if is_ambiguous { self.repository() } else { short.to_owned() }
    }

    /// The form for display, as `docker image ls` and `docker service ls` show it.
    pub fn familiar(&self) -> String {
        self.with_suffix(self.familiar_repository())
    }

    fn with_suffix(&self, mut name: String) -> String {
        if let Some(tag) = &self.tag {
            name.push(':');
            name.push_str(tag);
        }
        if let Some(digest) = &self.digest {
            name.push('@');
            name.push_str(&digest.to_string());
        }
        name
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.with_suffix(self.repository()))
    }
}

impl FromStr for Reference {
    type Err = ParseReferenceError;

    fn from_str(text: &str) -> Result<Self, ParseReferenceError> {
        let (rest, digest) = split_digest(text)?;
        let (name, tag) = split_tag(text, rest)?;
        if name.is_empty() {
            return Err(ParseReferenceError::Empty(text.to_owned()));
        }
        if Digest::from_hex(name).is_some() {
            return Err(ParseReferenceError::Identifier(text.to_owned()));
        }
        let (domain, path) = split_domain(name);
        check_domain(text, &domain)?;
        check_path(text, &path)?;
        let tag = match (tag, digest) {
            (Some(tag), _) => Some(tag.to_owned()),
            (None, Some(_)) => None,
            (None, None) => Some(DEFAULT_TAG.to_owned()),
        };
        Ok(Self { domain, path, tag, digest })
    }
}

impl Serialize for Reference {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Reference {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

fn split_digest(text: &str) -> Result<(&str, Option<Digest>), ParseReferenceError> {
    let Some((rest, digest)) = text.split_once('@') else {
        return Ok((text, None));
    };
    let digest = digest
        .parse()
        .map_err(|source| ParseReferenceError::Digest { name: text.to_owned(), source })?;
    Ok((rest, Some(digest)))
}

/// Splits the tag off. A colon before the last slash belongs to the registry's port.
fn split_tag<'a>(
    text: &str,
    rest: &'a str,
) -> Result<(&'a str, Option<&'a str>), ParseReferenceError> {
    let last = rest.rfind('/').map_or(0, |slash| slash + 1);
    let Some(colon) = rest[last..].find(':') else {
        return Ok((rest, None));
    };
    let (name, tag) = (&rest[..last + colon], &rest[last + colon + 1..]);
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let is_valid = tag.len() <= TAG_LEN_MAX
        && tag.bytes().next().is_some_and(is_word)
        && tag.bytes().all(|byte| is_word(byte) || matches!(byte, b'.' | b'-'));
    if !is_valid {
        let form = "one letter, digit or \"_\" and up to 127 more of these, \".\" or \"-\"";
        return Err(grammar(text, "tag", tag, form));
    }
    Ok((name, Some(tag)))
}

/// What stands before the first slash is a registry if it could be no account of Docker Hub.
fn split_domain(name: &str) -> (String, String) {
    let (domain, path) = match name.split_once('/') {
        Some((first, rest)) if is_domain_like(first) => (first, rest),
        _ => (DEFAULT_DOMAIN, name),
    };
    let domain = if domain == LEGACY_DOMAIN { DEFAULT_DOMAIN } else { domain };
    if domain == DEFAULT_DOMAIN && !path.contains('/') {
        return (domain.to_owned(), format!("{OFFICIAL_ACCOUNT}/{path}"));
    }
    (domain.to_owned(), path.to_owned())
}

fn is_domain_like(first: &str) -> bool {
    first == "localhost"
        || first.contains(['.', ':'])
        || first.bytes().any(|byte| byte.is_ascii_uppercase())
}

fn check_domain(text: &str, domain: &str) -> Result<(), ParseReferenceError> {
    let (host, port) = match domain.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((host, "")) => (host, None),
            Some((host, tail)) => (host, tail.strip_prefix(':').or(Some(""))),
            None => (rest, Some("")),
        },
        None => match domain.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (domain, None),
        },
    };
    let is_host = if domain.starts_with('[') {
        !host.is_empty() && host.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b':')
    } else {
        host.split('.').all(is_host_label)
    };
    let is_port =
        port.is_none_or(|port| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()));
    if is_host && is_port {
        return Ok(());
    }
    Err(grammar(text, "registry", domain, "host or host:port"))
}

fn is_host_label(label: &str) -> bool {
    let bytes = label.as_bytes();
    let ends_well = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    ends_well(bytes.first())
        && ends_well(bytes.last())
        && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || *byte == b'-')
}

fn check_path(text: &str, path: &str) -> Result<(), ParseReferenceError> {
    if path.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return Err(ParseReferenceError::Uppercase(path.to_owned()));
    }
    if let Some(component) = path.split('/').find(|component| !is_component(component)) {
        let form = "lower-case letters and digits, joined by \".\", \"_\", \"__\" or dashes";
        return Err(grammar(text, "component", component, form));
    }
    if path.len() > PATH_LEN_MAX {
        return Err(ParseReferenceError::TooLong(path.to_owned()));
    }
    Ok(())
}

fn is_component(component: &str) -> bool {
    let is_alnum = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = component.as_bytes();
    let ends_well = |byte: Option<&u8>| byte.is_some_and(|byte| is_alnum(*byte));
    if !ends_well(bytes.first()) || !ends_well(bytes.last()) {
        return false;
    }
    bytes.split(|byte| is_alnum(*byte)).all(|separator| {
        matches!(separator, b"" | b"." | b"_" | b"__") || separator.iter().all(|b| *b == b'-')
    })
}

fn grammar(name: &str, part: &'static str, value: &str, form: &'static str) -> ParseReferenceError {
    ParseReferenceError::Grammar { name: name.to_owned(), part, value: value.to_owned(), form }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[track_caller]
    fn check(text: &str, full: &str, familiar: &str) {
        let pinned = |form: &str| form.replace('@', &format!("@sha256:{HEX}"));
        let reference: Reference = pinned(text).parse().unwrap_or_else(|e| panic!("{text}: {e}"));
        assert_eq!(reference.to_string(), pinned(full), "{text}");
        assert_eq!(reference.familiar(), pinned(familiar), "{text}");
        assert_eq!(reference.to_string().parse::<Reference>().unwrap(), reference, "{text}");
        assert_eq!(reference.familiar().parse::<Reference>().unwrap(), reference, "{text}");
    }

    /// `@` stands for a whole digest.
    #[test]
    fn names_have_one_full_form_and_a_familiar_one() {
        for (text, full, familiar) in [
            ("whoami", "docker.io/library/whoami:latest", "whoami:latest"),
            ("docker.io/whoami", "docker.io/library/whoami:latest", "whoami:latest"),
            ("docker.io/library/whoami:latest", "docker.io/library/whoami:latest", "whoami:latest"),
            ("index.docker.io/library/a", "docker.io/library/a:latest", "a:latest"),
            ("library/whoami:1", "docker.io/library/whoami:1", "whoami:1"),
            ("traefik/whoami:v1.10", "docker.io/traefik/whoami:v1.10", "traefik/whoami:v1.10"),
            ("library/a/b", "docker.io/library/a/b:latest", "library/a/b:latest"),
            ("whoami@", "docker.io/library/whoami@", "whoami@"),
            ("whoami:2@", "docker.io/library/whoami:2@", "whoami:2@"),
            ("docker.io/a.b/c", "docker.io/a.b/c:latest", "docker.io/a.b/c:latest"),
            ("localhost/a", "localhost/a:latest", "localhost/a:latest"),
            ("localhost:5000/a:b", "localhost:5000/a:b", "localhost:5000/a:b"),
            ("r.example:5000/x/y@", "r.example:5000/x/y@", "r.example:5000/x/y@"),
            ("[fd00::1]:5000/a", "[fd00::1]:5000/a:latest", "[fd00::1]:5000/a:latest"),
            ("Registry/a", "Registry/a:latest", "Registry/a:latest"),
            ("a__b/c-----d.e_f:X_.-", "docker.io/a__b/c-----d.e_f:X_.-", "a__b/c-----d.e_f:X_.-"),
        ] {
            check(text, full, familiar);
        }
    }

    #[test]
    fn what_is_no_name_says_why() {
        let long = "a".repeat(256);
        let long_tag = format!("a:{}", "t".repeat(129));
        for (text, reason) in [
            ("", "has no repository"),
            (":tag", "has no repository"),
            (HEX, "because that is an image id"),
            ("Whoami", "must be lowercase"),
            ("docker.io/Whoami", "must be lowercase"),
            ("a:", "tag \"\" is not of the form"),
            ("a:-x", "tag \"-x\" is not of the form"),
            (&long_tag, "tag \"ttt"),
            ("a b", "component \"a b\" is not of the form"),
            ("a//b", "component \"\" is not of the form"),
            ("/a", "component \"\" is not of the form"),
            ("a/", "component \"\" is not of the form"),
            ("a___b", "component \"a___b\" is not of the form"),
            ("a..b/c", "registry \"a..b\" is not of the form"),
            ("a/b..c", "component \"b..c\" is not of the form"),
            ("../a", "registry \"..\" is not of the form"),
            ("r.example:x/a", "registry \"r.example:x\" is not of the form"),
            ("-r.example/a", "registry \"-r.example\" is not of the form"),
            ("[fd00::1/a", "registry \"[fd00::1\" is not of the form"),
            ("a@sha256:12", "has a digest that is not valid"),
            (&long, "is longer than 255 characters"),
        ] {
            let error = text.parse::<Reference>().unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn a_digest_is_added_and_taken_away() {
        let plain: Reference = "whoami:2".parse().unwrap();
        let digest = Digest::from_hex(HEX).unwrap();
        let pinned = plain.with_digest(digest);
        assert_eq!(pinned.to_string(), format!("docker.io/library/whoami:2@sha256:{HEX}"));
        assert_eq!(pinned.without_digest(), plain);
        let only: Reference = format!("whoami@sha256:{HEX}").parse().unwrap();
        assert_eq!(only.tag(), None);
        assert_eq!(only.without_digest().familiar(), "whoami:latest");
    }

    proptest! {
        #[test]
        fn parsing_never_panics_and_is_stable(text in "[a-zA-Z0-9:/@._\\[\\]-]{0,40}") {
            if let Ok(reference) = text.parse::<Reference>() {
                prop_assert_eq!(&reference.to_string().parse::<Reference>().unwrap(), &reference);
                prop_assert_eq!(&reference.familiar().parse::<Reference>().unwrap(), &reference);
            }
        }
    }
}
