//! The system's own memory, which GPUs without memory of their own use.

use std::path::Path;

/// MiB that the system has, and that are available.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostMemory {
    pub total_mib: u64,
    pub available_mib: u64,
}

/// Reads `/proc/meminfo`; `None` when it is not there.
pub fn memory(proc: &Path) -> Option<HostMemory> {
    parse(&std::fs::read_to_string(proc.join("meminfo")).ok()?)
}

fn parse(text: &str) -> Option<HostMemory> {
    let mib = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        let kib: u64 = line.split_ascii_whitespace().next()?.parse().ok()?;
        Some(kib / 1024)
    };
    Some(HostMemory {
        total_mib: mib("MemTotal:")?,
        available_mib: mib("MemAvailable:")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_are_read_in_mib() {
        let text = "MemTotal:       131072000 kB\nMemFree:  1 kB\nMemAvailable:   65536000 kB\n";
        let expected = HostMemory {
            total_mib: 128_000,
            available_mib: 64_000,
        };
        assert_eq!(parse(text), Some(expected));
        assert_eq!(parse("MemTotal: x kB\n"), None);
    }
}
