//! Whether something ended for want of GPU memory, by what it says: frameworks have a few usual words for it.

use super::logs::Logs;
use crate::domain::command::OUT_OF_MEMORY;
use crate::domain::event::Exit;
use crate::domain::ids::ServiceName;

/// What frameworks write. Those of the JVM mean the machine's own memory.
const WORDS: [&str; 6] = [
    "CUDA out of memory",
    "HIP out of memory",
    "OutOfMemoryError",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "cudaErrorMemoryAllocation",
    "hipErrorOutOfMemory",
];
const NOT_OURS: &str = "java.lang.OutOfMemoryError";

/// Lines at an output's end that tell why it ended.
const LAST_LINES: usize = 50;

/// Whether a text says so.
pub fn tells_out_of_memory(text: &str) -> bool {
    let said = |line: &str| WORDS.iter().any(|word| line.contains(word));
    text.lines()
        .any(|line| said(line) && !line.contains(NOT_OURS))
}

/// Whether a failed call's answer says so, by its words or by its `code`.
pub fn answers_out_of_memory(body: &str) -> bool {
    let is_code = |value: Option<&serde_json::Value>| {
        value.and_then(serde_json::Value::as_str) == Some(OUT_OF_MEMORY)
    };
    let coded = serde_json::from_str::<serde_json::Value>(body).is_ok_and(|answer| {
        [
            "/code",
            "/error/code",
            "/detail/code",
            "/error",
            "/detail/error",
        ]
        .iter()
        .any(|member| is_code(answer.pointer(member)))
    });
    coded || tells_out_of_memory(body)
}

/// Whether an instance that ended like this says so at the end of its output, which began at `from`.
pub(super) async fn ended_out_of_memory(
    logs: &Logs,
    service: &ServiceName,
    from: u64,
    exit: &Exit,
) -> bool {
    if matches!(exit, Exit::Code(0) | Exit::NotStarted(_)) {
        return false;
    }
    let lines = logs.tail_from(service, from, LAST_LINES).await;
    lines.is_ok_and(|lines| lines.iter().any(|line| tells_out_of_memory(line)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_words_are_known_and_others_memory_is_not_ours() {
        for text in [
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
            "x\nRuntimeError: HIP error: hipErrorOutOfMemory\n",
            "CUDA_ERROR_OUT_OF_MEMORY: out of memory",
        ] {
            assert!(tells_out_of_memory(text), "{text}");
        }
        for text in [
            "",
            "java.lang.OutOfMemoryError: Java heap space",
            "out of memory",
            "MemoryError",
        ] {
            assert!(!tells_out_of_memory(text), "{text}");
        }
    }

    #[test]
    fn an_answer_may_say_it_by_a_code() {
        for body in [
            r#"{"code":"out_of_memory"}"#,
            r#"{"error":{"code":"out_of_memory","message":"m"}}"#,
            r#"{"detail":{"error":"out_of_memory"}}"#,
            r#"{"detail":"CUDA out of memory"}"#,
        ] {
            assert!(answers_out_of_memory(body), "{body}");
        }
        for body in [r#"{"code":"busy"}"#, r#""out_of_memory""#, "nothing"] {
            assert!(!answers_out_of_memory(body), "{body}");
        }
    }
}
