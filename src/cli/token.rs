//! `rungate token`: one's own tokens or, as an administrator, somebody else's.

use clap::{Args, Subcommand};
use reqwest::Method;
use serde_json::{Value, json};

use super::Context;
use super::client::segment;
use super::error::{CliError, Exit};
use super::output::{instant, table, text};
use super::session::Whose;

/// Verbs of `rungate token`.
#[derive(Debug, Subcommand)]
pub enum Token {
    /// Make a token and print it; it is shown only here
    #[command(
        after_help = "Example:\n  rungate token create ci --scope runs:read --scope runs:write --expires-in-days 90"
    )]
    Create(Create),
    /// List tokens
    List(Whose),
    /// End a token at once
    Revoke {
        /// As `rungate token list` shows it
        token_id: String,
        #[command(flatten)]
        whose: Whose,
    },
    /// Sign job tokens with a new key; earlier ones verify until their last token has expired
    RotateSigningKey,
}

#[derive(Args, Debug)]
pub struct Create {
    /// Tells it from your other tokens
    name: String,
    /// runs:read, runs:write, services:read, services:write, ledger:read, inference or *; all when absent
    #[arg(long = "scope", value_name = "SCOPE")]
    scopes: Vec<String>,
    /// For good when absent
    #[arg(long, value_name = "DAYS", value_parser = clap::value_parser!(u64).range(1..=3650))]
    expires_in_days: Option<u64>,
}

const PATH: &str = "api/gateway/tokens";
const ROTATE: &str = "api/gateway/admin/signing-keys/rotate";

impl Token {
    pub(super) async fn perform(self, context: &Context) -> Result<Exit, CliError> {
        let client = context.client()?;
        match self {
            Token::Create(create) => {
                let mut body = json!({"name": create.name});
                if !create.scopes.is_empty() {
                    body["scopes"] = json!(create.scopes);
                }
                if let Some(days) = create.expires_in_days {
                    body["expires_in_s"] = json!(days * 86_400);
                }
                let answer = client.post(PATH, &body).await?;
                context.out.show(&answer, |answer| text(answer, "token"))?;
                context.out.note("keep it: it is shown only here");
            }
            Token::List(whose) => {
                let answer = client.get(PATH, &whose.query()).await?;
                context.out.show(&answer, words)?;
            }
            Token::Revoke { token_id, whose } => {
                let path = format!("{PATH}/{}", segment(&token_id));
                let answer = client
                    .call(Method::DELETE, &path, &whose.query(), None)
                    .await?;
                context
                    .out
                    .show(&answer, |_| format!("{token_id} revoked"))?;
            }
            Token::RotateSigningKey => {
                let answer = client.post(ROTATE, &json!({})).await?;
                context.out.show(&answer, |answer| {
                    format!("job tokens are signed with key {}", text(answer, "kid"))
                })?;
            }
        }
        Ok(Exit::Success)
    }
}

fn words(answer: &Value) -> String {
    let tokens = answer["tokens"].as_array().into_iter().flatten();
    let row = |token: &Value| {
        vec![
            text(token, "token_id"),
            text(token, "name"),
            super::user::listed(token, "scopes"),
            instant(token, "created_at"),
            instant(token, "expires_at"),
            instant(token, "last_used_at"),
        ]
    };
    table(
        &["TOKEN", "NAME", "SCOPES", "CREATED", "EXPIRES", "LAST USED"],
        tokens.map(row).collect(),
    )
}
