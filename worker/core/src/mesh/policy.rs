//! Which backends of a port a node sends connections to.

use ipnet::Ipv4Net;

use super::Backend;

/// Of the healthy backends those in the node's own slice, where there are some: a connection then stays
/// on the machine that it came in through. Without any of its own, a node uses all.
pub fn prefer_local(backends: Vec<Backend>, own_slice: Ipv4Net) -> Vec<Backend> {
    let is_local = |backend: &Backend| own_slice.contains(&backend.address);
    match backends.iter().any(is_local) {
        true => backends.into_iter().filter(is_local).collect(),
        false => backends,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_backends_come_first_and_the_others_only_without_them() {
        for (name, given, expect) in [
            ("own and others", "10.192.4.1 10.192.8.1 10.192.4.2", "10.192.4.1 10.192.4.2"),
            ("own alone", "10.192.4.1", "10.192.4.1"),
            ("others alone", "10.192.8.1 10.192.12.1", "10.192.8.1 10.192.12.1"),
            ("none", "", ""),
        ] {
            let backend = |address: &str| Backend {
                task_id: address.to_owned(),
                address: address.parse().unwrap(),
                target_port: 80,
            };
            let backends = given.split_whitespace().map(backend).collect();
            let kept = prefer_local(backends, "10.192.4.0/22".parse().unwrap());
            let kept: Vec<String> = kept.into_iter().map(|backend| backend.task_id).collect();
            assert_eq!(kept.join(" "), expect, "{name}");
        }
    }
}
