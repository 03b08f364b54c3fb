//! The documentation is true: its commands run, in order and as written, against a real gateway; its links
//! lead somewhere; it names every route, error and metric.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::support::{Gateway, Options, binary};

const GETTING_STARTED: &str = include_str!("../../docs/getting-started.md");

/// A fenced block: the words after the fence, and the text in it.
struct Block<'a> {
    info: &'a str,
    text: String,
}

fn blocks(page: &str) -> Vec<Block<'_>> {
    let mut found = Vec::new();
    let mut open: Option<Block> = None;
    for line in page.lines() {
        match (line.strip_prefix("```"), open.as_mut()) {
            (Some(_), Some(_)) => found.extend(open.take()),
            (Some(info), None) => {
                open = Some(Block {
                    info,
                    text: String::new(),
                });
            }
            (None, Some(block)) => {
                block.text.push_str(line);
                block.text.push('\n');
            }
            (None, None) => {}
        }
    }
    assert!(open.is_none(), "a block is not closed");
    found
}

/// The page's `bash` blocks as one script. The default address becomes that of the gateway under test; nothing
/// else is changed.
fn script(page: &str, gateway: &Gateway) -> String {
    let commands: String = blocks(page)
        .into_iter()
        .filter(|block| block.info == "bash")
        .map(|block| block.text)
        .collect();
    assert!(commands.lines().count() > 10, "the page has its examples");
    let commands = commands.replace("127.0.0.1:8080", &gateway.addr().to_string());
    format!("set -euo pipefail\n{commands}\necho THE END\n")
}

/// Runs a page's commands in order, in the repository, and finds what the page promises in their output.
async fn run_page(page: &str, promised: &[&str]) {
    let gateway = Gateway::start(Options::gpus("sim:24GiB")).await;
    let home = tempfile::tempdir().unwrap();
    let state = home.path().join(".local/state");
    std::fs::create_dir_all(&state).unwrap();
    std::os::unix::fs::symlink(gateway.data_dir(), state.join("rungate")).unwrap();
    let folder = binary().parent().expect("the binary lies in a folder");
    let path = std::env::var("PATH").unwrap_or_default();
    let mut bash = Command::new("bash");
    bash.args(["-c", &script(page, &gateway)])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env_clear()
        .env("HOME", home.path())
        .env("PATH", format!("{}:{path}", folder.display()))
        .env("RUNGATE_URL", gateway.url(""))
        .stdin(Stdio::null());
    let run = tokio::task::spawn_blocking(move || bash.output().expect("bash is there"));
    let output = run.await.unwrap();
    // A page may leave its service running; its environment does not name this gateway's directory, so that
    // the gateway's end would not end it. 404 when the page has removed it.
    let stop = "/services/text-stats/stop?drain=false";
    gateway.post(stop, serde_json::json!({})).await;
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{out}\n--- stderr\n{err}");
    for text in promised.iter().chain(&["THE END"]) {
        assert!(
            out.contains(text),
            "{text} is not in\n{out}\n--- stderr\n{err}"
        );
    }
}

#[tokio::test]
async fn getting_started_works_as_written() {
    let serve: Vec<Block> = blocks(GETTING_STARTED)
        .into_iter()
        .filter(|block| block.info == "bash serve")
        .collect();
    // The gateway under test is started with the same options, on an address of its own.
    assert_eq!(serve.len(), 1);
    assert_eq!(serve[0].text, "rungate serve --gpus sim:24GiB\n");
    let promised = [
        "\"cause\":\"no_service\"",
        "\"duplicate\":true",
        "event: done",
        "\"resumed_at_bytes\":",
        "job_paused             reason=lunch",
        "ok         true",
        "text-stats removed",
    ];
    run_page(GETTING_STARTED, &promised).await;
}

#[tokio::test]
async fn the_readme_works_as_written() {
    let promised = [
        "\"cause\":\"no_service\"",
        "\"driver\":\"process\"",
        "\"state\":\"applied\"",
        "\"type\":\"job_completed\"",
        "event: done",
    ];
    run_page(include_str!("../../README.md"), &promised).await;
}

/// The pages, by their path.
fn pages() -> Vec<(std::path::PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let docs = std::fs::read_dir(root.join("docs")).unwrap();
    docs.map(|entry| entry.unwrap().path())
        .chain([root.join("README.md"), root.join("CHANGELOG.md")])
        .filter(|path| path.extension().is_some_and(|ending| ending == "md"))
        .map(|path| (path.clone(), std::fs::read_to_string(&path).unwrap()))
        .collect()
}

/// A heading's anchor: lower case, spaces as hyphens, other marks left out.
fn anchors(page: &str) -> Vec<String> {
    let headings = page.lines().filter(|line| line.starts_with('#'));
    let anchor = |line: &str| {
        let kept = line.trim_start_matches('#').trim().to_lowercase();
        kept.chars()
            .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'))
            .map(|c| if c == ' ' { '-' } else { c })
            .collect()
    };
    headings.map(anchor).collect()
}

#[test]
fn every_link_leads_somewhere() {
    for (path, page) in pages() {
        let links = page
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next());
        for link in links.filter(|link| !link.starts_with("http")) {
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => path.clone(),
                file => path.parent().unwrap().join(file),
            };
            let there = std::fs::read_to_string(&target);
            let there = there.unwrap_or_else(|error| panic!("{}: {link}: {error}", path.display()));
            assert!(
                anchor.is_empty() || anchors(&there).iter().any(|known| known == anchor),
                "{}: {link} has no such heading",
                path.display()
            );
        }
    }
}

#[test]
fn the_api_page_names_every_route_and_every_error() {
    let page = include_str!("../../docs/api.md");
    let api = serde_json::to_value(rungate::api::openapi()).unwrap();
    let paths = api["paths"].as_object().unwrap();
    for path in paths.keys() {
        // The GPU dialect is documented at the root, and said to be in both places.
        let at_root = path.strip_prefix("/api/gateway").unwrap_or(path);
        let told = |path: &str| page.contains(&format!("{path}`"));
        assert!(
            told(path) || (paths.contains_key(at_root) && told(at_root)),
            "{path} is not in docs/api.md"
        );
    }
    for code in rungate::api::error::ErrorCode::ALL {
        let name = format!("`{}`", code.as_str());
        assert!(page.contains(&name), "{name} is not in docs/api.md");
    }
}

#[test]
fn the_api_page_names_every_kind_of_record_and_no_other() {
    let page = include_str!("../../docs/api.md");
    let (_, table) = page.split_once("| about | `effect.type` |\n").unwrap();
    let (table, _) = table.split_once("\n\n").unwrap();
    let told: BTreeSet<&str> = table.split('`').skip(1).step_by(2).collect();
    let names: Vec<String> = crate::ledger_world::one_of_each()
        .iter()
        .map(|event| rungate::ledger::view::name_and_fields(event).0)
        .collect();
    let names: BTreeSet<&str> = names.iter().map(String::as_str).collect();
    assert_eq!(told, names);
}

#[tokio::test]
async fn the_operating_page_names_every_metric() {
    let page = include_str!("../../docs/operating.md");
    let gateway = Gateway::start(Options::gpus("sim:1GiB")).await;
    let answer = crate::support::answer(gateway.request(reqwest::Method::GET, "/metrics")).await;
    let kinds = answer.text.lines().filter_map(|line| {
        let mut words = line.strip_prefix("# TYPE ")?.split(' ');
        words.next()
    });
    let mut count = 0;
    for name in kinds {
        count += 1;
        assert!(
            page.contains(&format!("`{name}")),
            "{name} is not in docs/operating.md"
        );
    }
    assert!(count > 8, "{}", answer.text);
}
