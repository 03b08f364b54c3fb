//! Opening: each thing that can be wrong is one clear sentence, and nothing is changed by it.

use std::path::Path;
use std::process::Command;

use rungate::ledger::{CommitError, FILE_NAME, Ledger, OpenError, OpenOptions};
use tempfile::TempDir;

use crate::ledger_world::{append, queued, run_id};

fn open(path: &Path) -> Result<(), OpenError> {
    Ledger::open(path, &OpenOptions::default()).map(drop)
}

fn with_records() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let (_ledger, mut writer) = Ledger::open(directory.path(), &OpenOptions::default()).unwrap();
    append(
        &mut writer,
        [(queued(run_id(1)), "{}"), (queued(run_id(2)), "{}")],
    );
    directory
}

/// Fails as expected, in a sentence that names the file, and leaves the directory as it was.
fn refuses(directory: &Path, expected: fn(&OpenError) -> bool) {
    let before = contents(directory);
    let error = open(directory).unwrap_err();
    let text = error.to_string();
    assert!(expected(&error), "{error:?}");
    assert!(text.contains(directory.to_str().unwrap()), "{text}");
    assert!(!text.contains('\n') && text.len() < 400, "{text}");
    assert!(
        contents(directory) == before,
        "something was changed: {text}"
    );
}

fn contents(directory: &Path) -> Option<Vec<(std::ffi::OsString, Vec<u8>)>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).ok()? {
        let entry = entry.unwrap();
        files.push((
            entry.file_name(),
            std::fs::read(entry.path()).unwrap_or_default(),
        ));
    }
    files.sort();
    Some(files)
}

#[test]
fn a_ledger_goes_on_where_it_was_left() {
    let directory = with_records();
    let (ledger, mut writer) = Ledger::open(directory.path(), &OpenOptions::default()).unwrap();
    let instance = ledger.instance_id();
    append(&mut writer, [(queued(run_id(3)), "{}")]);
    assert_eq!(ledger.tail(), 3);
    drop((ledger, writer));
    let ledger = Ledger::open_read_only(directory.path(), &OpenOptions::default()).unwrap();
    assert_eq!((ledger.tail(), ledger.instance_id()), (3, instance));
    ledger.verify(&mut |_| {}).unwrap();
}

#[test]
fn a_missing_directory_is_made_for_its_owner_only() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a/b");
    open(&path).unwrap();
    assert_eq!(
        std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o700
    );
}

#[test]
fn what_a_crash_left_of_a_ledger_in_the_making_is_thrown_away() {
    for left in [&b""[..], b"redb", &[0; 10_000]] {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("ledger.redb.new"), left).unwrap();
        open(directory.path()).unwrap();
        open(directory.path()).unwrap();
        let names: Vec<_> = std::fs::read_dir(directory.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(names, [FILE_NAME]);
    }
}

#[test]
fn a_ledger_in_use_is_refused() {
    let directory = with_records();
    let _held = Ledger::open(directory.path(), &OpenOptions::default()).unwrap();
    refuses(directory.path(), |error| {
        matches!(error, OpenError::Locked { .. })
    });
    let error = Ledger::open_read_only(directory.path(), &OpenOptions::default()).map(drop);
    assert!(matches!(error, Err(OpenError::Locked { .. })));
}

#[test]
fn a_file_that_is_none_of_ours_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(FILE_NAME);
    std::fs::write(&path, "Dear diary, this is no ledger at all.".repeat(300)).unwrap();
    refuses(directory.path(), |error| {
        matches!(error, OpenError::NotALedger { .. })
    });
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    refuses(directory.path(), |error| {
        matches!(error, OpenError::NotALedger { .. })
    });
    std::fs::remove_dir(&path).unwrap();
    drop(redb::Database::create(&path).unwrap());
    refuses(directory.path(), |error| {
        matches!(error, OpenError::NotALedger { .. })
    });
}

#[test]
fn a_truncated_file_is_refused_wherever_it_ends() {
    let directory = with_records();
    let path = directory.path().join(FILE_NAME);
    let whole = std::fs::read(&path).unwrap();
    let ends = [
        0,
        1,
        8,
        9,
        64,
        300,
        511,
        512,
        4_095,
        4_096,
        8_192,
        100_000,
        whole.len() - 1,
    ];
    for end in ends.into_iter().filter(|end| *end < whole.len()) {
        std::fs::write(&path, &whole[..end]).unwrap();
        refuses(directory.path(), |error| {
            matches!(error, OpenError::Damaged { .. })
        });
    }
}

#[test]
fn another_format_is_refused() {
    let directory = with_records();
    let path = directory.path().join(FILE_NAME);
    let set = |format: u32| {
        let database = redb::Database::open(&path).unwrap();
        let transaction = database.begin_write().unwrap();
        let meta = redb::TableDefinition::<&[u8], &[u8]>::new("meta");
        let mut table = transaction.open_table(meta).unwrap();
        table
            .insert(&b"format"[..], &format.to_le_bytes()[..])
            .unwrap();
        drop(table);
        transaction.commit().unwrap();
    };
    set(9);
    refuses(directory.path(), |error| {
        matches!(error, OpenError::NewerFormat { found: 9, .. })
    });
    set(1);
    refuses(directory.path(), |error| {
        matches!(error, OpenError::OlderFormat { found: 1, .. })
    });
}

#[test]
fn a_data_directory_that_is_a_file_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("data");
    std::fs::write(&path, "x").unwrap();
    refuses(&path, |error| {
        matches!(error, OpenError::NotADirectory { .. })
    });
    let below = path.join("deeper");
    refuses(&below, |error| {
        matches!(error, OpenError::NotADirectory { .. })
    });
}

/// A small file system of its own; only root can mount one.
struct Tmpfs(TempDir);

impl Tmpfs {
    fn mount(options: &str) -> Option<Tmpfs> {
        let directory = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "none"])
            .arg(directory.path())
            .output()
            .is_ok_and(|output| output.status.success());
        mounted.then_some(Tmpfs(directory))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.path()).status();
    }
}

#[test]
fn a_full_disk_is_refused_before_anything_is_written() {
    let Some(disk) = Tmpfs::mount("size=8m") else {
        eprintln!("cannot mount a tmpfs here; `ledger_disk` has the simulated one");
        return;
    };
    refuses(disk.path(), |error| {
        matches!(error, OpenError::DiskFull { .. })
    });
}

#[test]
fn a_disk_that_fills_up_poisons_the_writer_and_keeps_what_was_acknowledged() {
    let Some(disk) = Tmpfs::mount("size=24m") else {
        eprintln!("cannot mount a tmpfs here; `ledger_disk` has the simulated one");
        return;
    };
    let (ledger, mut writer) = Ledger::open(disk.path(), &OpenOptions::default()).unwrap();
    let payload = "x".repeat(300_000);
    let mut acknowledged = 0;
    let error = loop {
        let mut batch = writer.begin().unwrap();
        let event = queued(run_id(acknowledged));
        batch
            .append(&crate::ledger_world::record(
                crate::ledger_world::START,
                event,
                &payload,
            ))
            .unwrap();
        match batch.commit() {
            Ok(seq) => acknowledged = seq,
            Err(error) => break error,
        }
        assert!(acknowledged < 1_000);
    };
    assert!(matches!(error, CommitError::DiskFull(_)), "{error:?}");
    assert!(matches!(
        writer.begin().map(drop),
        Err(CommitError::Poisoned)
    ));
    drop((ledger, writer));
    let remount = Command::new("mount")
        .args(["-o", "remount,size=64m"])
        .arg(disk.path())
        .status();
    assert!(remount.unwrap().success());
    let (ledger, _writer) = Ledger::open(disk.path(), &OpenOptions::default()).unwrap();
    assert!(ledger.tail() >= acknowledged);
    ledger.verify(&mut |_| {}).unwrap();
}

#[test]
fn a_read_only_file_system_is_refused() {
    let Some(disk) = Tmpfs::mount("size=64m") else {
        eprintln!("cannot mount a tmpfs here");
        return;
    };
    let remount = |options: &str| {
        let status = Command::new("mount")
            .args(["-o", options])
            .arg(disk.path())
            .status();
        assert!(status.unwrap().success());
    };
    remount("remount,ro");
    refuses(disk.path(), |error| {
        matches!(error, OpenError::ReadOnly { .. })
    });
    remount("remount,rw");
    open(disk.path()).unwrap();
    remount("remount,ro");
    refuses(disk.path(), |error| {
        matches!(error, OpenError::ReadOnly { .. })
    });
}

#[test]
fn missing_permission_is_told() {
    use std::os::unix::fs::PermissionsExt;
    if rustix::process::geteuid().is_root() {
        eprintln!("root may read and write everything; run as another user to see this");
        return;
    }
    let directory = with_records();
    let path = directory.path().join(FILE_NAME);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o400)).unwrap();
    refuses(directory.path(), |error| {
        matches!(error, OpenError::PermissionDenied { .. })
    });
}
