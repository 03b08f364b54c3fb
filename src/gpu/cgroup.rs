//! Which container a process is in, by its control groups.

/// Digits of a container's id.
const ID_DIGITS: usize = 64;

/// The container's id in a `/proc/<pid>/cgroup`, of version 1 or 2 of the kernel's groups: the last part of 64
/// hexadecimal digits in a path, with or without what container engines write around it. `None` outside of containers.
pub fn container_of(groups: &str) -> Option<&str> {
    groups.lines().find_map(|line| {
        // `hierarchy:controllers:path`, of which controllers may hold `name=…`, and the path anything.
        let path = line.splitn(3, ':').nth(2)?;
        path.rsplit('/').find_map(id_in)
    })
}

/// The id in `<id>`, `docker-<id>.scope`, `cri-containerd-<id>.scope`, `libpod-<id>` and the like.
fn id_in(part: &str) -> Option<&str> {
    let part = part.strip_suffix(".scope").unwrap_or(part);
    let id = part.rsplit(['-', ':']).next().unwrap_or(part);
    let is_id = id.len() == ID_DIGITS && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_id.then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "3f1c9a0b7d52e8643f1c9a0b7d52e8643f1c9a0b7d52e8643f1c9a0b7d52e864";

    #[test]
    fn every_engines_way_of_writing_it_is_known() {
        let v1 =
            format!("12:pids:/docker/{ID}\n11:memory:/docker/{ID}\n1:name=systemd:/docker/{ID}\n");
        let files = [
            v1,
            format!("0::/docker/{ID}\n"),
            format!("0::/system.slice/docker-{ID}.scope\n"),
            format!("0::/system.slice/docker-{ID}.scope/init/deeper\n"),
            format!("0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-{ID}.scope\n"),
            format!(
                "9:cpu:/system.slice/containerd.service/kubepods-besteffort:cri-containerd:{ID}\n"
            ),
            format!("0::/machine.slice/libpod-{ID}.scope/container\n"),
            format!("13:misc:/\n12:memory:/user.slice\n0::/docker/{ID}\n"),
        ];
        for file in files {
            assert_eq!(container_of(&file), Some(ID), "{file}");
        }
    }

    #[test]
    fn outside_of_containers_there_is_none() {
        let short = &ID[..63];
        let files = [
            String::new(),
            "0::/\n".to_owned(),
            "0::/user.slice/user-1000.slice/session-2.scope\n".to_owned(),
            format!("0::/docker/{short}\n"),
            format!("0::/docker/{short}g\n"),
            format!("nonsense {ID}"),
        ];
        for file in files {
            assert_eq!(container_of(&file), None, "{file}");
        }
    }
}
