//! Who a container's process runs as, from the texts of the image's passwd and group files.

use super::Error;

/// The identity of a container's process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedUser {
    /// User number.
    pub uid: u32,
    /// Primary group number.
    pub gid: u32,
    /// All groups, the primary one first.
    pub groups: Vec<u32>,
    /// Home directory.
    pub home: String,
}

struct PasswdEntry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

struct GroupEntry<'a> {
    name: &'a str,
    gid: u32,
    members: Vec<&'a str>,
}

/// Resolves `user` (`name`, `uid`, `name:group`, `uid:gid`; empty is root) and the names or numbers
/// in `groups` against the image's files, which may be empty.
///
/// A name wins over a number that is written alike. The user's groups of the group file count only
/// where no group is given. Source: moby `user.GetExecUser` and `daemon/oci_linux.go`, `getUser`.
pub fn resolve(
    user: &str,
    groups: &[String],
    passwd: &str,
    group: &str,
) -> Result<ResolvedUser, Error> {
    let (user_text, group_text) = user.split_once(':').unwrap_or((user, ""));
    let wanted_uid = if user_text.is_empty() { Some(0) } else { number(user_text) };
    let entries: Vec<PasswdEntry<'_>> = passwd.lines().filter_map(passwd_entry).collect();
    let group_entries: Vec<GroupEntry<'_>> = group.lines().filter_map(group_entry).collect();

    // As in Docker, the first line that matches by name or by number is the user.
    let found = entries.iter().find(|entry| {
        (!user_text.is_empty() && entry.name == user_text) || Some(entry.uid) == wanted_uid
    });
    let (uid, mut gid, home) = match (found, wanted_uid) {
        (Some(entry), _) => (entry.uid, entry.gid, entry.home),
        (None, Some(uid)) => (uid, 0, ""),
        (None, None) => return Err(Error::UnknownUser(user_text.to_owned())),
    };

    let mut further = Vec::new();
    if !group_text.is_empty() {
        gid = find_group(group_text, &group_entries)?;
    } else if let Some(entry) = found {
        let of_user = group_entries.iter().filter(|group| group.members.contains(&entry.name));
        further.extend(of_user.map(|group| group.gid));
    }
    for group in groups {
        further.push(find_group(group, &group_entries)?);
    }

    let mut all = vec![gid];
    for gid in further {
        if !all.contains(&gid) {
            all.push(gid);
        }
    }
    let home = if home.is_empty() { "/" } else { home };
    Ok(ResolvedUser { uid, gid, groups: all, home: home.to_owned() })
}

fn find_group(text: &str, entries: &[GroupEntry<'_>]) -> Result<u32, Error> {
    let wanted = number(text);
    let found = entries.iter().find(|entry| entry.name == text || Some(entry.gid) == wanted);
    found.map(|entry| entry.gid).or(wanted).ok_or_else(|| Error::UnknownGroup(text.to_owned()))
}

/// Ids above `i32::MAX` are refused, as Docker does: some kernels interfaces read them as negative.
fn number(text: &str) -> Option<u32> {
    text.parse::<u32>().ok().filter(|id| i32::try_from(*id).is_ok())
}

fn passwd_entry(line: &str) -> Option<PasswdEntry<'_>> {
    let mut fields = line.trim().split(':');
    let name = fields.next().filter(|name| !name.is_empty() && !name.starts_with('#'))?;
    let uid = fields.nth(1)?.parse().ok()?;
    let gid = fields.next()?.parse().ok()?;
    let home = fields.nth(1).unwrap_or("");
    Some(PasswdEntry { name, uid, gid, home })
}

fn group_entry(line: &str) -> Option<GroupEntry<'_>> {
    let mut fields = line.trim().split(':');
    let name = fields.next().filter(|name| !name.is_empty() && !name.starts_with('#'))?;
    let gid = fields.nth(1)?.parse().ok()?;
    let members = fields.next().unwrap_or("").split(',').filter(|name| !name.is_empty()).collect();
    Some(GroupEntry { name, gid, members })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n# comment\nbroken\n\
        www-data:x:33:33:www:/var/www:/bin/false\n1000:x:7:8::/odd:\nnohome:x:50:50:::\n";
    const GROUP: &str = "root:x:0:\nwww-data:x:33:\nadm:x:4:www-data,root\nssl:x:110:www-data\n";

    #[track_caller]
    fn check(user: &str, groups: &[&str], expect: Result<(u32, u32, &[u32], &str), Error>) {
        let groups: Vec<String> = groups.iter().map(ToString::to_string).collect();
        let expect = expect.map(|(uid, gid, groups, home)| ResolvedUser {
            uid,
            gid,
            groups: groups.to_vec(),
            home: home.to_owned(),
        });
        assert_eq!(resolve(user, &groups, PASSWD, GROUP), expect, "{user:?} {groups:?}");
    }

    #[test]
    fn users_and_groups_resolve_as_in_docker() {
        check("", &[], Ok((0, 0, &[0, 4], "/root")));
        check("root", &[], Ok((0, 0, &[0, 4], "/root")));
        check("www-data", &[], Ok((33, 33, &[33, 4, 110], "/var/www")));
        check("33", &[], Ok((33, 33, &[33, 4, 110], "/var/www")));
        check("www-data:adm", &[], Ok((33, 4, &[4], "/var/www")));
        check("33:0", &[], Ok((33, 0, &[0], "/var/www")));
        check("4711", &[], Ok((4711, 0, &[0], "/")));
        check("4711:4712", &["adm", "99"], Ok((4711, 4712, &[4712, 4, 99], "/")));
        check("1000", &[], Ok((7, 8, &[8], "/odd")));
        check("nohome", &[], Ok((50, 50, &[50], "/")));
        check("ghost", &[], Err(Error::UnknownUser("ghost".into())));
        check("root:ghosts", &[], Err(Error::UnknownGroup("ghosts".into())));
        check("root", &["ghosts"], Err(Error::UnknownGroup("ghosts".into())));
        check("4294967295", &[], Err(Error::UnknownUser("4294967295".into())));
        check("-1", &[], Err(Error::UnknownUser("-1".into())));
    }

    #[test]
    fn an_image_without_files_has_root_and_numbers() {
        let root = resolve("", &[], "", "").unwrap();
        assert_eq!((root.uid, root.gid, root.home.as_str()), (0, 0, "/"));
        assert_eq!(resolve("5:6", &[], "", "").unwrap().groups, [6]);
    }
}
