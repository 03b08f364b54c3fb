//! Signed heads of the ledger: what was changed behind the gateway's back is found with one that was kept elsewhere,
//! even when the whole chain was made anew.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::rungate::{run, rungate};
use crate::support::{Gateway, Options};

/// A stopped gateway's data, and a checkpoint of it with its public key, in another place.
struct Kept {
    gateway: Gateway,
    elsewhere: tempfile::TempDir,
}

impl Kept {
    async fn make() -> Kept {
        let mut gateway = Gateway::start(Options::default()).await;
        let job = || json!({"service_type": "t", "payload": {"n": 1}});
        for _ in 0..3 {
            gateway.start_job(job()).await;
        }
        let elsewhere = tempfile::tempdir().unwrap();
        // One from the running gateway, one from the stopped one's file.
        let online = gateway.get("/api/gateway/ledger/checkpoint").await;
        let online = online.expect(200).to_string();
        gateway.start_job(job()).await;
        gateway.stop().await;
        let kept = Kept { gateway, elsewhere };
        let (code, offline, err) = kept.ledger(&kept.data_dir(), &["checkpoint"]);
        assert_eq!((code, offline.lines().count()), (0, 1), "{err}");
        std::fs::write(kept.heads(), format!("{online}\n{offline}")).unwrap();
        let key = kept.data_dir().join("auth/checkpoint-key.pub");
        std::fs::copy(key, kept.key()).unwrap();
        kept
    }

    fn data_dir(&self) -> PathBuf {
        self.gateway.data_dir()
    }

    fn heads(&self) -> PathBuf {
        self.elsewhere.path().join("heads.jsonl")
    }

    fn key(&self) -> PathBuf {
        self.elsewhere.path().join("key.pub")
    }

    fn ledger(&self, data_dir: &Path, arguments: &[&str]) -> (i32, String, String) {
        let mut words = vec!["ledger"];
        words.extend(arguments);
        words.extend(["--data-dir", data_dir.to_str().unwrap(), "--json"]);
        run(rungate(self.elsewhere.path(), &words))
    }

    fn verify(&self, data_dir: &Path) -> (i32, String, String) {
        let (heads, key) = (self.heads(), self.key());
        let files = ["--checkpoint", heads.to_str().unwrap(), "--public-key"];
        let mut words = vec!["verify"];
        words.extend(files);
        words.push(key.to_str().unwrap());
        self.ledger(data_dir, &words)
    }

    /// The records as an export has them.
    fn export(&self) -> Vec<Value> {
        let (code, out, err) = self.ledger(&self.data_dir(), &["export"]);
        assert_eq!(code, 0, "{err}");
        out.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    /// A ledger of these records, its chain made anew where they were changed: what somebody can do who may write
    /// the file. Its id is the old one's only when it is the old file.
    fn forge(&self, records: &[Value]) -> PathBuf {
        let forged = self.elsewhere.path().join("forged");
        let lines: Vec<String> = rechained(records).iter().map(Value::to_string).collect();
        let file = self.elsewhere.path().join("forged.ndjson");
        std::fs::write(&file, lines.join("\n") + "\n").unwrap();
        let (code, _, err) = self.ledger(&forged, &["import", file.to_str().unwrap()]);
        assert_eq!(code, 0, "{err}");
        take_over_id(&self.data_dir(), &forged);
        forged
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The same records with hashes that follow, as the format has them.
fn rechained(records: &[Value]) -> Vec<Value> {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;
    use rungate::domain::ids::PlaneId;
    use rungate::domain::time::Timestamp;
    use rungate::ledger::record_codec::{GENESIS, Raw};
    let mut prev_hash = GENESIS;
    let mut seq = 0;
    let number = |record: &Value, name: &str| record[name].as_u64().unwrap();
    let bytes =
        |record: &Value, name: &str| STANDARD.decode(record[name].as_str().unwrap()).unwrap();
    let mut chained = records.to_vec();
    for record in &mut chained {
        seq += 1;
        let (event, meta) = (bytes(record, "event_bytes"), bytes(record, "meta_bytes"));
        let payload = bytes(record, "payload");
        let raw = Raw {
            format: u16::try_from(number(record, "format")).unwrap(),
            purged: false,
            plane: PlaneId(u32::try_from(number(record, "plane")).unwrap()),
            at: Timestamp(record["at_us"].as_i64().unwrap()),
            cursor: number(record, "cursor"),
            run: record["run"].as_str().map(|run| run.parse().unwrap()),
            prev_hash,
            payload_hash: *blake3::hash(&payload).as_bytes(),
            hash: GENESIS,
            event: &event,
            meta: &meta,
            payload_len: u32::try_from(payload.len()).unwrap(),
            payload: &payload,
        };
        let hash = raw.computed_hash(seq);
        record["seq"] = seq.into();
        record["prev_hash"] = hex(&prev_hash).into();
        record["payload_hash"] = hex(&raw.payload_hash).into();
        record["hash"] = hex(&hash).into();
        prev_hash = hash;
    }
    chained
}

/// Writes one ledger's id into another, as whoever forges a ledger would.
fn take_over_id(from: &Path, to: &Path) {
    use redb::{Database, ReadableDatabase, TableDefinition};
    const META: TableDefinition<&[u8], &[u8]> = TableDefinition::new("meta");
    let open = |dir: &Path| Database::open(dir.join("ledger.redb")).unwrap();
    let id = {
        let database = open(from);
        let read = database.begin_read().unwrap();
        let table = read.open_table(META).unwrap();
        let id = table.get(&b"instance"[..]).unwrap().unwrap();
        id.value().to_vec()
    };
    let database = open(to);
    let write = database.begin_write().unwrap();
    write
        .open_table(META)
        .unwrap()
        .insert(&b"instance"[..], &id[..])
        .unwrap();
    write.commit().unwrap();
}

#[tokio::test]
async fn a_ledger_that_went_through_its_checkpoints_verifies() {
    let mut kept = Kept::make().await;
    let (code, out, err) = kept.verify(&kept.data_dir());
    assert_eq!(code, 0, "{err}");
    let verified: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(verified["checkpoints"], 2);
    // A ledger that was copied by export and import is the same chain, and another ledger by name only.
    let copy = kept.forge(&kept.export());
    assert_eq!(kept.verify(&copy).0, 0);
    // The running gateway, which goes on, has not left them either.
    kept.gateway.launch().await;
    let (heads, key) = (kept.heads(), kept.key());
    let words = [
        "ledger",
        "verify",
        "--json",
        "--checkpoint",
        heads.to_str().unwrap(),
        "--public-key",
        key.to_str().unwrap(),
    ];
    let mut command = rungate(kept.elsewhere.path(), &words);
    command
        .env("RUNGATE_URL", kept.gateway.url(""))
        .env("RUNGATE_TOKEN_FILE", kept.gateway.token_path());
    let (code, out, err) = run(command);
    assert_eq!(code, 0, "{out}{err}");
    let verified: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(verified["checkpoints"], 2);
}

#[tokio::test]
async fn what_was_changed_behind_the_gateway_is_found() {
    let kept = Kept::make().await;
    let records = kept.export();
    let is_start = |record: &&Value| record["event"]["job_queued"].is_object();
    let start = records.iter().position(|record| is_start(&record)).unwrap();
    type Change = Box<dyn Fn(&mut Vec<Value>)>;
    let attacks: Vec<(&str, Change, &str)> = vec![
        (
            "edited",
            Box::new(move |all| all[start]["payload"] = "eyJuIjoyfQ==".into()),
            "rewritten",
        ),
        (
            "deleted",
            Box::new(move |all| drop(all.remove(start))),
            "rewritten",
        ),
        (
            "reordered",
            Box::new(move |all| all.swap(start, start + 1)),
            "rewritten",
        ),
        (
            "truncated",
            Box::new(|all| all.truncate(all.len() - 2)),
            "cut short",
        ),
        (
            "made anew from the first record on",
            Box::new(|all| all[0]["at_us"] = (all[0]["at_us"].as_i64().unwrap() - 1).into()),
            "rewritten",
        ),
    ];
    for (attack, change, finding) in attacks {
        let mut forged = records.clone();
        change(&mut forged);
        let dir = kept.forge(&forged);
        let (code, out, _) = kept.ledger(&dir, &["verify"]);
        assert_eq!(
            code, 0,
            "{attack}: the forged chain is whole in itself: {out}"
        );
        let (code, out, err) = kept.verify(&dir);
        assert_eq!(code, 1, "{attack}: {out}");
        assert!(err.contains(finding), "{attack}: {err}");
        std::fs::remove_dir_all(dir).unwrap();
    }
}

#[tokio::test]
async fn a_checkpoint_that_was_changed_or_is_of_another_key_proves_nothing() {
    let kept = Kept::make().await;
    let text = std::fs::read_to_string(kept.heads()).unwrap();
    let first: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    let mut later = first.clone();
    later["seq"] = (first["seq"].as_u64().unwrap() - 1).into();
    let mut other = first.clone();
    other["ledger"] = json!(uuid::Uuid::new_v4());
    for (heads, finding) in [
        (later.to_string(), "signature"),
        (other.to_string(), "signature"),
        (String::new(), "no checkpoint"),
        ("{}".to_owned(), "no checkpoint"),
    ] {
        std::fs::write(kept.heads(), heads).unwrap();
        let (code, _, err) = kept.verify(&kept.data_dir());
        assert_eq!(code, 1, "{err}");
        assert!(err.contains(finding), "{err}");
    }
    std::fs::write(kept.heads(), text).unwrap();
    std::fs::write(kept.key(), "7".repeat(64)).unwrap();
    let (code, _, err) = kept.verify(&kept.data_dir());
    assert_eq!(code, 1, "{err}");
    assert!(err.contains("was signed with key"), "{err}");
    std::fs::write(kept.key(), "no key").unwrap();
    assert_eq!(kept.verify(&kept.data_dir()).0, 2);
    // The key is its owner's only.
    use std::os::unix::fs::PermissionsExt;
    let key = kept.data_dir().join("auth/checkpoint-key");
    let mode = std::fs::metadata(key).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}
