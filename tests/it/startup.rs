//! What can be wrong at the start: one clear sentence, an exit code that is not 0, and nothing changed on disk.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rungate::ledger::{FILE_NAME, Ledger, OpenOptions};
use tempfile::TempDir;

use crate::rungate::{run, rungate};
use crate::support::{Gateway, Options};

/// Everything under a directory: kind, permissions, contents.
fn contents(dir: &Path) -> BTreeMap<PathBuf, String> {
    let mut all = BTreeMap::new();
    let Ok(metadata) = std::fs::symlink_metadata(dir) else {
        return all;
    };
    let mode = metadata.permissions().mode();
    if metadata.is_dir() {
        for entry in std::fs::read_dir(dir).unwrap().flatten() {
            all.extend(contents(&entry.path()));
        }
        all.insert(dir.to_owned(), format!("{mode:o}"));
    } else {
        let hash = blake3::hash(&std::fs::read(dir).unwrap());
        all.insert(dir.to_owned(), format!("{mode:o} {hash}"));
    }
    all
}

fn serve(home: &Path, data: &Path) -> Command {
    let data = data.to_str().unwrap();
    rungate(
        home,
        &["serve", "--listen", "127.0.0.1:0", "--data-dir", data],
    )
}

/// It ends with one line that holds all of `words`, and leaves `data` as it was.
#[track_caller]
fn refuses(command: Command, data: &Path, words: &[&str]) {
    let before = contents(data);
    let (code, _, message) = run(command);
    assert_ne!(code, 0, "{message}");
    assert_eq!(message.trim_end().lines().count(), 1, "{message}");
    for word in words {
        assert!(message.contains(word), "'{word}' is not in: {message}");
    }
    assert_eq!(contents(data), before, "{message}");
}

fn made_ledger() -> TempDir {
    let home = TempDir::new().unwrap();
    drop(Ledger::open(&home.path().join("data"), &OpenOptions::default()).unwrap());
    home
}

#[test]
fn a_taken_port_is_told_and_nothing_is_made() {
    let home = TempDir::new().unwrap();
    let data = home.path().join("data");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap().to_string();
    let data_text = data.to_str().unwrap();
    let command = rungate(
        home.path(),
        &["serve", "--listen", &addr, "--data-dir", data_text],
    );
    refuses(command, &data, &[&addr, "taken", "--listen"]);
    assert!(!data.exists());
}

#[tokio::test]
async fn a_second_gateway_on_the_same_data_is_refused_and_the_first_goes_on() {
    let home = TempDir::new().unwrap();
    let gateway = Gateway::start(Options::default()).await;
    let command = serve(home.path(), &gateway.data_dir());
    let (code, _, message) = run(command);
    assert_ne!(code, 0);
    assert!(message.contains("in use by another process"), "{message}");
    gateway.get("/api/gateway/ping").await.expect(200);
}

#[test]
fn a_newer_format_is_told() {
    let home = made_ledger();
    let data = home.path().join("data");
    let database = redb::Database::open(data.join(FILE_NAME)).unwrap();
    let write = database.begin_write().unwrap();
    let meta = redb::TableDefinition::<&[u8], &[u8]>::new("meta");
    let format = 99u32.to_le_bytes();
    write
        .open_table(meta)
        .unwrap()
        .insert(b"format".as_slice(), format.as_slice())
        .unwrap();
    write.commit().unwrap();
    drop(database);
    let command = serve(home.path(), &data);
    refuses(command, &data, &["format 99", "newer rungate", FILE_NAME]);
}

#[test]
fn a_damaged_ledger_is_told_and_kept() {
    type Damage = fn(&mut Vec<u8>);
    let damages: [(&str, Damage); 4] = [
        ("cut to nothing", |bytes| bytes.clear()),
        ("cut short", |bytes| bytes.truncate(5_000)),
        ("another file", |bytes| bytes[0] ^= 0xff),
        ("a flipped header", |bytes| {
            for byte in &mut bytes[9..320] {
                *byte ^= 0x55;
            }
        }),
    ];
    for (what, damage) in damages {
        let home = made_ledger();
        let data = home.path().join("data");
        let path = data.join(FILE_NAME);
        let mut bytes = std::fs::read(&path).unwrap();
        damage(&mut bytes);
        std::fs::write(&path, bytes).unwrap();
        eprintln!("{what}");
        refuses(serve(home.path(), &data), &data, &[FILE_NAME]);
    }
}

#[test]
fn data_that_is_a_file_is_told() {
    let home = TempDir::new().unwrap();
    let data = home.path().join("data");
    std::fs::write(&data, "hello").unwrap();
    refuses(serve(home.path(), &data), &data, &["data", "--data-dir"]);
}

#[test]
fn a_read_only_file_system_is_told() {
    let home = TempDir::new().unwrap();
    let data = home.path().join("data");
    std::fs::create_dir(&data).unwrap();
    let _mounted = Tmpfs::mount(&data, "ro,size=64m");
    refuses(serve(home.path(), &data), &data, &["read-only"]);
}

#[test]
fn a_full_disk_is_told() {
    let home = TempDir::new().unwrap();
    let data = home.path().join("data");
    std::fs::create_dir(&data).unwrap();
    let _mounted = Tmpfs::mount(&data, "size=4m");
    refuses(serve(home.path(), &data), &data, &["no space left", "free"]);
}

#[test]
fn wrong_settings_are_told() {
    let home = made_ledger();
    let data = home.path().join("data");
    for (name, value) in [
        ("RUNGATE_GPUS", "sim:lots"),
        ("RUNGATE_GPUS", "sim:24GiB,"),
        ("RUNGATE_PREEMPT_PRIORITY_GAP", "9"),
        ("RUNGATE_LISTEN", "nowhere"),
    ] {
        let mut command = rungate(
            home.path(),
            &["serve", "--data-dir", data.to_str().unwrap()],
        );
        if name != "RUNGATE_LISTEN" {
            command.env("RUNGATE_LISTEN", "127.0.0.1:0");
        }
        command.env(name, value);
        eprintln!("{name}={value}");
        refuses(command, &data, &[]);
    }
}

#[test]
fn a_broken_token_file_is_told() {
    for file in ["bootstrap-admin-token", "webhook-secret"] {
        for text in ["\n", "short", "two words on a line that is long enough"] {
            let home = made_ledger();
            let data = home.path().join("data");
            std::fs::create_dir(data.join("auth")).unwrap();
            let path = data.join("auth").join(file);
            std::fs::write(&path, text).unwrap();
            let own = std::fs::Permissions::from_mode(0o600);
            std::fs::set_permissions(&path, own).unwrap();
            refuses(serve(home.path(), &data), &data, &[file]);
        }
    }
}

/// A file system in memory, gone when dropped.
pub struct Tmpfs(PathBuf);

impl Tmpfs {
    pub fn mount(at: &Path, options: &str) -> Tmpfs {
        mount(&["-t", "tmpfs", "-o", options, "tmpfs"], at);
        Tmpfs(at.to_owned())
    }

    pub fn resize(&self, size: &str) {
        mount(&["-o", &format!("remount,size={size}")], &self.0);
    }
}

#[track_caller]
fn mount(arguments: &[&str], at: &Path) {
    let status = Command::new("mount").args(arguments).arg(at).status();
    assert!(
        status.is_ok_and(|status| status.success()),
        "this test mounts a file system of its own, which takes root"
    );
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
