//! What `/proc` tells of processes: who a pid is, which processes bear an instance's mark, and which
//! belong to its process group. Reads only; signals are `process`'s business.

use std::path::PathBuf;
use std::{fs, io};

use smol_str::{SmolStr, ToSmolStr};
use uuid::Uuid;

use crate::domain::ids::{Generation, ServiceName};

/// The environment variable that tells whose process it is. Descendants inherit it.
pub const MARK_VARIABLE: &str = "RUNGATE_INSTANCE";

/// An environment is bounded by the kernel at about 6 MiB (argv and environment share it); ours are small.
const ENVIRONMENT_MAX_BYTES: usize = 8 << 20;

/// Which instance of which gateway's ledger a process belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Mark {
    /// The ledger's instance id: another gateway's processes are never touched.
    pub ledger: Uuid,
    pub service: ServiceName,
    pub generation: Generation,
}

impl Mark {
    /// `<ledger>/<service>/<generation>`; a service's name holds no slash.
    pub fn text(&self) -> String {
        format!(
            "{}/{}/{}",
            self.ledger.hyphenated(),
            self.service,
            self.generation
        )
    }

    /// `None` for a text that is no mark.
    pub fn parse(text: &str) -> Option<Mark> {
        let mut parts = text.split('/');
        let mark = Mark {
            ledger: Uuid::try_parse(parts.next()?).ok()?,
            service: parts.next()?.to_smolstr(),
            generation: Generation(parts.next()?.parse().ok()?),
        };
        parts.next().is_none().then_some(mark)
    }
}

/// One line of `/proc/<pid>/stat`, as far as we need it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    pub state: char,
    pub process_group: u32,
    /// Clock ticks from boot to the process's start; with the pid it is unique within one boot.
    pub start_ticks: u64,
}

impl Stat {
    /// It has ended and only waits for its parent to take notice.
    pub fn is_zombie(self) -> bool {
        matches!(self.state, 'Z' | 'X')
    }
}

/// A process that bears a mark.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Marked {
    pub pid: u32,
    pub stat: Stat,
    pub mark: Mark,
    /// Its `PORT`.
    pub port: Option<u16>,
}

/// This boot's id: a pid and its start time mean nothing after a reboot.
pub fn boot_id() -> io::Result<SmolStr> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_smolstr())
}

/// `None` when there is no such process.
pub fn stat(pid: u32) -> Option<Stat> {
    let bytes = fs::read(file_of(pid, "stat")).ok()?;
    parse_stat(&String::from_utf8_lossy(&bytes))
}

/// The command's name stands in parentheses and may hold anything, parentheses and spaces included.
fn parse_stat(line: &str) -> Option<Stat> {
    let (_, rest) = line.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    let process_group = fields.nth(1)?.parse().ok()?;
    // Field 22 of the line; the state is field 3 and the process group field 5.
    let start_ticks = fields.nth(16)?.parse().ok()?;
    Some(Stat {
        state,
        process_group,
        start_ticks,
    })
}

/// The live process `pid` if it bears a mark. Processes of other users are invisible, and so are zombies,
/// which have no environment any more.
pub fn marked(pid: u32) -> Option<Marked> {
    let environment = fs::read(file_of(pid, "environ")).ok()?;
    if environment.len() > ENVIRONMENT_MAX_BYTES {
        return None;
    }
    let mark = Mark::parse(variable(&environment, MARK_VARIABLE)?)?;
    let port = variable(&environment, "PORT").and_then(|port| port.parse().ok());
    let stat = stat(pid).filter(|stat| !stat.is_zombie())?;
    Some(Marked {
        pid,
        stat,
        mark,
        port,
    })
}

/// Every live process that bears a mark of `ledger`. Costs a read per process of the machine.
pub fn marked_by(ledger: Uuid) -> Vec<Marked> {
    pids()
        .filter_map(marked)
        .filter(|process| process.mark.ledger == ledger)
        .collect()
}

/// The mark that a live process bears, itself or by the leader of its process group: a descendant may have wiped its
/// environment.
pub fn mark_of(pid: u32) -> Option<Mark> {
    let leader = || stat(pid).map(|stat| stat.process_group);
    let found = marked(pid).or_else(|| marked(leader().filter(|leader| *leader != pid)?));
    found.map(|process| process.mark)
}

/// Live members of a process group.
pub fn group_members(process_group: u32) -> Vec<u32> {
    pids()
        .filter(|&pid| {
            stat(pid).is_some_and(|stat| stat.process_group == process_group && !stat.is_zombie())
        })
        .collect()
}

fn pids() -> impl Iterator<Item = u32> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

fn file_of(pid: u32, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/{name}"))
}

/// The first value of a variable in a block of `NAME=value\0`.
fn variable<'a>(environment: &'a [u8], name: &str) -> Option<&'a str> {
    environment
        .split(|&byte| byte == 0)
        .find_map(|entry| entry.strip_prefix(name.as_bytes())?.strip_prefix(b"="))
        .and_then(|value| std::str::from_utf8(value).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_name_full_of_tricks_is_read_over() {
        let line = "42 (a) S 1 2 (x) R 7 77 78 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 123456 1 2";
        assert_eq!(
            parse_stat(line),
            Some(Stat {
                state: 'R',
                process_group: 77,
                start_ticks: 123_456
            })
        );
        assert_eq!(parse_stat("42 (a"), None);
    }

    #[test]
    fn our_own_process_has_an_identity() {
        let own = stat(std::process::id()).unwrap();
        assert!(own.start_ticks > 0 && !own.is_zombie());
        assert_eq!(boot_id().unwrap().len(), 36);
    }

    #[test]
    fn a_mark_round_trips_and_nothing_else_parses() {
        let mark = Mark {
            ledger: Uuid::nil(),
            service: "llm-1".into(),
            generation: Generation(7),
        };
        assert_eq!(Mark::parse(&mark.text()), Some(mark.clone()));
        for text in [
            "",
            "x/y/1",
            &format!("{}/1", mark.text()),
            &mark.text()[..38],
        ] {
            assert_eq!(Mark::parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_variable_is_matched_whole() {
        let block = b"MY_PORT=1\0PORT=2\0PORT=3\0";
        assert_eq!(variable(block, "PORT"), Some("2"));
        assert_eq!(variable(block, "POR"), None);
    }
}
