//! `rungate session`: browsers that are logged in, one's own or, as an administrator, somebody else's.

use clap::{Args, Subcommand};
use reqwest::Method;
use serde_json::Value;

use super::Context;
use super::client::segment;
use super::error::{CliError, Exit};
use super::output::{instant, table, text};

/// Verbs of `rungate session`.
#[derive(Debug, Subcommand)]
pub enum Session {
    /// List sessions
    List(Whose),
    /// End a session at once
    End {
        /// As `rungate session list` shows it
        session_id: String,
        #[command(flatten)]
        whose: Whose,
    },
}

#[derive(Args, Debug)]
pub(super) struct Whose {
    /// Whose; your own when absent
    #[arg(long)]
    user: Option<String>,
    /// Its tenant: your own, or `default` for an administrator
    #[arg(long, requires = "user")]
    tenant: Option<String>,
}

impl Whose {
    pub(super) fn query(self) -> Vec<(&'static str, String)> {
        let user = self.user.map(|user| ("user_id", user));
        let tenant = self.tenant.map(|tenant| ("tenant_id", tenant));
        user.into_iter().chain(tenant).collect()
    }
}

const PATH: &str = "api/gateway/sessions";

impl Session {
    pub(super) async fn perform(self, context: &Context) -> Result<Exit, CliError> {
        let client = context.client()?;
        match self {
            Session::List(whose) => {
                let answer = client.get(PATH, &whose.query()).await?;
                context.out.show(&answer, words)?;
            }
            Session::End { session_id, whose } => {
                let path = format!("{PATH}/{}", segment(&session_id));
                let query = whose.query();
                let answer = client.call(Method::DELETE, &path, &query, None).await?;
                context
                    .out
                    .show(&answer, |_| format!("{session_id} ended"))?;
            }
        }
        Ok(Exit::Success)
    }
}

fn words(answer: &Value) -> String {
    let sessions = answer["sessions"].as_array().into_iter().flatten();
    let row = |session: &Value| {
        vec![
            text(session, "session_id"),
            text(session, "login"),
            instant(session, "created_at"),
            instant(session, "last_used_at"),
            instant(session, "expires_at"),
            text(session, "address"),
            text(session, "user_agent"),
        ]
    };
    let header = [
        "SESSION",
        "LOGIN",
        "CREATED",
        "LAST USED",
        "EXPIRES",
        "ADDRESS",
        "BROWSER",
    ];
    table(&header, sessions.map(row).collect())
}
