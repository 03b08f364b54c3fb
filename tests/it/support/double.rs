//! Made-up GPUs: a shared library with the interface of NVIDIA's, and the file that it reads its answers from.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use tempfile::TempDir;

use super::{Gateway, Options};

/// One GPU, or a part of one. Sizes in MiB.
#[derive(Clone)]
pub struct Gpu {
    pub uuid: &'static str,
    pub total: u64,
    /// Taken, and no process accounts for it.
    pub stray: u64,
    /// Kept by the driver.
    pub reserved: u64,
    pub part_of: Option<&'static str>,
    /// Further members, as the library reads them.
    pub more: String,
}

impl Gpu {
    pub fn new(uuid: &'static str, total: u64) -> Gpu {
        Gpu {
            uuid,
            total,
            stray: 0,
            reserved: 0,
            part_of: None,
            more: String::new(),
        }
    }

    pub fn with(mut self, more: &str) -> Gpu {
        self.more = more.to_owned();
        self
    }
}

/// A process on a GPU.
#[derive(Clone)]
pub struct User {
    pub on: &'static str,
    pub pid: u64,
    pub mib: u64,
}

/// All that the library tells.
#[derive(Clone, Default)]
pub struct Machine {
    pub gpus: Vec<Gpu>,
    pub users: Vec<User>,
    /// GPU and number of each error so far.
    pub xids: Vec<(&'static str, u64)>,
}

impl Machine {
    pub fn gpu(&mut self, uuid: &str) -> &mut Gpu {
        let found = self.gpus.iter_mut().find(|gpu| gpu.uuid == uuid);
        found.expect("there is such a GPU")
    }

    fn text(&self) -> String {
        let mut text = String::new();
        for gpu in &self.gpus {
            let users = self.users.iter().filter(|user| user.on == gpu.uuid);
            let used = gpu.stray + users.map(|user| user.mib).sum::<u64>();
            let kind = match gpu.part_of {
                Some(parent) => format!("part of={parent}"),
                None => "gpu".to_owned(),
            };
            text += &format!(
                "{kind} uuid={} total={} used={used} reserved={} name=Made_{} {}\n",
                gpu.uuid, gpu.total, gpu.reserved, gpu.uuid, gpu.more
            );
        }
        for user in &self.users {
            let User { on, pid, mib } = user;
            text += &format!("process on={on} pid={pid} mib={mib} kind=C\n");
        }
        for (n, (on, code)) in (1..).zip(&self.xids) {
            text += &format!("xid n={n} on={on} code={code}\n");
        }
        text
    }
}

/// The library with its file.
pub struct Double {
    dir: TempDir,
    machine: Mutex<Machine>,
}

impl Double {
    pub fn new(gpus: impl IntoIterator<Item = Gpu>) -> Double {
        let double = Double {
            dir: TempDir::new().unwrap(),
            machine: Mutex::default(),
        };
        double.edit(|machine| machine.gpus.extend(gpus));
        double
    }

    /// Changes what the library tells from now on.
    pub fn edit(&self, edit: impl FnOnce(&mut Machine)) {
        let mut machine = self.machine.lock().unwrap();
        edit(&mut machine);
        let next = self.dir.path().join("next");
        std::fs::write(&next, machine.text()).unwrap();
        std::fs::rename(next, self.state()).unwrap();
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// A gateway that looks at these GPUs ten times a second.
    pub fn options(&self) -> Options {
        Options::gpus("")
            .set("RUNGATE_NVML_LIBRARY", library().to_str().unwrap())
            .set("NVML_DOUBLE_STATE", self.state().to_str().unwrap())
            .set("RUNGATE_GPU_SAMPLE_MS", "100")
    }

    pub async fn gateway(&self) -> Gateway {
        Gateway::start(self.options()).await
    }
}

/// The built library. Tests run in processes of their own, so it is built under another name and then renamed.
pub fn library() -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/nvml/double.c");
    let hash = blake3::hash(&std::fs::read(&source).unwrap()).to_hex();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let library = folder.join(format!("nvml-double-{}.so", &hash[..16]));
    if !library.exists() {
        let built = folder.join(format!("nvml-double-{}.new", std::process::id()));
        let status = Command::new("cc")
            .args([
                "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o",
            ])
            .args([&built, &source])
            .status();
        assert!(status.expect("cc is installed").success());
        std::fs::rename(built, &library).unwrap();
    }
    library
}
