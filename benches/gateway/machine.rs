//! What the machine is, and what a process on it takes.

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::report::{Machine, median};

/// Describes the machine; `dir` is where the measurements put their files.
pub fn describe(dir: &Path) -> io::Result<Machine> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or_else(|| "processor".to_owned(), |(_, name)| name.to_owned());
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Ok(Machine {
        cpu,
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        kernel: kernel.trim().to_owned(),
        fdatasync_us: fdatasync_us(dir)?,
        busy: busy(Duration::from_millis(500)),
    })
}

fn fdatasync_us(dir: &Path) -> io::Result<f64> {
    let path = dir.join("fdatasync");
    let file = fs::File::create(&path)?;
    file.write_all_at(&[0; 1 << 16], 0)?;
    file.sync_all()?;
    let mut times = Vec::new();
    for n in 0..200u64 {
        let started = Instant::now();
        file.write_all_at(&[n as u8; 4096], n % 16 * 4096)?;
        file.sync_data()?;
        times.push(started.elapsed().as_secs_f64() * 1e6);
    }
    fs::remove_file(&path)?;
    Ok(median(&times))
}

/// The share of the processors that others use, over `time`.
pub fn busy(time: Duration) -> f64 {
    let before = cpu_ticks();
    std::thread::sleep(time);
    let after = cpu_ticks();
    let total = (after.0 - before.0).max(1.0);
    1.0 - (after.1 - before.1) / total
}

/// All ticks so far, and the idle ones.
fn cpu_ticks() -> (f64, f64) {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let ticks: Vec<f64> = stat
        .lines()
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .skip(1)
        .filter_map(|field| field.parse().ok())
        .collect();
    let idle = ticks.get(3).unwrap_or(&0.0) + ticks.get(4).unwrap_or(&0.0);
    (ticks.iter().sum(), idle)
}

/// A process's memory in bytes: resident now, and the most it ever was.
pub fn memory(pid: u32) -> io::Result<(u64, u64)> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib = |name: &str| {
        status
            .lines()
            .find_map(|line| {
                line.strip_prefix(name)?
                    .split_whitespace()
                    .next()?
                    .parse::<u64>()
                    .ok()
            })
            .unwrap_or(0)
    };
    Ok((kib("VmRSS:") * 1024, kib("VmHWM:") * 1024))
}

/// Bytes that a file takes on disk: sparse parts count nothing.
pub fn disk_bytes(path: &Path) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(fs::metadata(path)?.blocks() * 512)
}

/// Asks the kernel to forget a file's cached pages, so that the next read comes from the disk.
pub fn forget_cached(path: &Path) -> io::Result<()> {
    let file = fs::File::open(path)?;
    file.sync_all()?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    Ok(())
}

/// Seconds of processor time that a process has used, all its threads together.
pub fn processor_s(pid: u32) -> io::Result<f64> {
    let mut ns = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread that has just ended is missed; those here live as long as their server.
        let stat = fs::read_to_string(task?.path().join("schedstat")).unwrap_or_default();
        let field = stat.split_whitespace().next();
        ns += field.and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(ns as f64 / 1e9)
}
