//! Keys as they are pressed: the terminal hands them over at once, and gets its old manners back in the end.

use std::io::{IsTerminal, Read};

use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use tokio::sync::mpsc;

/// Listens as long as it lives.
pub struct Keys {
    before: Option<Termios>,
    pressed: mpsc::UnboundedReceiver<u8>,
}

impl Keys {
    /// Hears nothing when nobody sits there.
    pub fn listen(is_wanted: bool) -> Keys {
        let (sender, pressed) = mpsc::unbounded_channel();
        let stdin = std::io::stdin();
        let mut before = None;
        if is_wanted && stdin.is_terminal() {
            before = tcgetattr(&stdin).ok().filter(|modes| {
                let mut at_once = modes.clone();
                // Ctrl-C stays a signal.
                at_once.local_modes -= LocalModes::ICANON | LocalModes::ECHO;
                tcsetattr(&stdin, OptionalActions::Now, &at_once).is_ok()
            });
            // It ends with the process, or with the first key after nobody listens.
            std::thread::spawn(move || {
                for byte in std::io::stdin().lock().bytes().map_while(Result::ok) {
                    if sender.send(byte).is_err() {
                        return;
                    }
                }
            });
        }
        Keys { before, pressed }
    }

    /// Returns when `q` was pressed.
    pub async fn quit(&mut self) {
        while let Some(key) = self.pressed.recv().await {
            if matches!(key, b'q' | b'Q') {
                return;
            }
        }
        // Nobody presses anything any more.
        std::future::pending().await
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            // A terminal that is gone needs no manners.
            let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, before);
        }
    }
}
