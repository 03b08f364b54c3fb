//! Whether a process's control group is frozen, as `docker pause` does it; version 1 and 2 of them.

use std::fs;
use std::path::{Path, PathBuf};

/// Whether the kernel lets none of its threads run. A group that is not seen from here counts as running.
pub fn is_frozen(pid: u32) -> bool {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let states = places(&groups, &mounts).into_iter().map(fs::read_to_string);
    states.flatten().any(|state| tells_frozen(&state))
}

/// `frozen 1` among the events of version 2; `FROZEN`, or `FREEZING` on the way there, in version 1.
fn tells_frozen(state: &str) -> bool {
    let mut lines = state.lines().map(str::trim);
    lines.any(|line| matches!(line, "frozen 1" | "FROZEN" | "FREEZING"))
}

/// The files that tell it, from `/proc/<pid>/cgroup` and our `mountinfo`.
fn places(groups: &str, mounts: &str) -> Vec<PathBuf> {
    let group = |line: &str| -> Option<PathBuf> {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        if controllers.is_empty() {
            return Some(below(mounts, "cgroup2", None, path)?.join("cgroup.events"));
        }
        let mut names = controllers.split(',');
        names.find(|name| *name == "freezer")?;
        Some(below(mounts, "cgroup", Some("freezer"), path)?.join("freezer.state"))
    };
    groups.lines().filter_map(group).collect()
}

/// Where a group lies below the mount of its hierarchy, which may show only a part of it.
fn below(mounts: &str, kind: &str, controller: Option<&str>, path: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (place, about) = line.split_once(" - ")?;
        let mut place = place.split(' ').skip(3);
        let (root, point) = (place.next()?, place.next()?);
        let mut about = about.split(' ');
        let (its_kind, options) = (about.next()?, about.nth(1)?);
        let has = |wanted: &str| options.split(',').any(|option| option == wanted);
        if its_kind != kind || !controller.is_none_or(has) {
            return None;
        }
        let rest = Path::new(path).strip_prefix(root).ok()?;
        Some(Path::new(point).join(rest))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
29 23 0:26 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755
30 29 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:10 - cgroup2 cgroup2 rw
33 29 0:30 /docker /sys/fs/cgroup/freezer rw,nosuid shared:15 - cgroup cgroup rw,freezer
34 29 0:31 / /sys/fs/cgroup/memory rw,nosuid shared:16 - cgroup cgroup rw,memory
";

    #[test]
    fn a_group_is_found_below_the_mount_of_its_hierarchy() {
        let groups = "6:freezer:/docker/abc\n4:memory:/docker/abc\n0::/docker/abc\n";
        let expected = [
            "/sys/fs/cgroup/freezer/abc/freezer.state",
            "/sys/fs/cgroup/unified/docker/abc/cgroup.events",
        ];
        assert_eq!(places(groups, MOUNTS), expected.map(PathBuf::from));
        // Outside of what is mounted here.
        assert!(places("6:freezer:/user\n", MOUNTS).is_empty());
        assert!(places("nonsense\n", MOUNTS).is_empty());
    }

    #[test]
    fn both_versions_say_it_in_their_own_words() {
        assert!(tells_frozen("populated 1\nfrozen 1\n"));
        assert!(!tells_frozen("populated 1\nfrozen 0\n"));
        assert!(tells_frozen("FROZEN\n") && tells_frozen("FREEZING\n"));
        assert!(!tells_frozen("THAWED\n"));
    }
}
