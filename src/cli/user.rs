//! `rungate user`: users, for administrators; and recovery of the first administrator from the machine's shell.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use reqwest::Method;
use serde_json::{Map, Value, json};

use super::Context;
use super::client::{Client, segment};
use super::error::{CliError, Exit};
use super::output::{facts, instant, plain, table, text};
use super::password;
use crate::server;

/// Largest registry file that is read.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// Users of one request of an import.
const IMPORT_PAGE: usize = 500;

const PATH: &str = "api/gateway/admin/users";

/// Verbs of `rungate user`.
#[derive(Debug, Subcommand)]
pub enum User {
    /// Create a user and print its token; it is shown only here
    #[command(after_help = "Example:\n  rungate user create alice --role operator > alice.token")]
    Create(Create),
    /// List users
    List,
    /// Show one user
    Show(Named),
    /// Refuse all of its tokens until it is enabled again
    Disable(Named),
    /// Accept its tokens again
    Enable(Named),
    /// Delete it; its runtime stays reserved until it is transferred or purged
    Delete(Named),
    /// End all of its tokens, its password and its sessions, and print a new token
    Rotate(Named),
    /// Set a password for the console; your own when no user is named. Ends all of the user's sessions
    #[command(
        after_help = "The password is asked for, or read from standard input, a line each: for your own the current one \
                      first.\n\nExample:\n  rungate user password alice < password.txt"
    )]
    Password {
        user_id: Option<String>,
        /// Your own, or `default` for an administrator
        #[arg(long, requires = "user_id")]
        tenant: Option<String>,
        /// Take it away
        #[arg(long, requires = "user_id")]
        remove: bool,
    },
    /// Take over the users of an AbstractGateway, whose tokens go on working
    #[command(
        after_help = "Example:\n  rungate user import /var/lib/abstractgateway/auth/users.json"
    )]
    Import {
        /// Its registry, version 2
        file: PathBuf,
    },
    /// Write a new token for the first administrator and end all that it made, with the gateway stopped
    #[command(after_help = "Example:\n  rungate user recover-admin --data-dir /var/lib/rungate")]
    RecoverAdmin,
}

#[derive(Args, Debug)]
pub struct Named {
    user_id: String,
    /// Your own, or `default` for an administrator
    #[arg(long)]
    tenant: Option<String>,
}

#[derive(Args, Debug)]
pub struct Create {
    #[command(flatten)]
    named: Named,
    /// admin, tenant_admin, operator, user or viewer; user when absent
    #[arg(long = "role", value_name = "ROLE")]
    roles: Vec<String>,
    /// Restricts all of its tokens; no restriction when absent
    #[arg(long = "scope", value_name = "SCOPE")]
    scopes: Vec<String>,
    #[arg(long)]
    email: Option<String>,
    /// Its data plane's name; its id when absent
    #[arg(long)]
    runtime: Option<String>,
}

impl User {
    pub(super) async fn perform(self, context: &Context) -> Result<Exit, CliError> {
        if let User::RecoverAdmin = self {
            return recover_admin(context).await;
        }
        let client = context.client()?;
        match self {
            User::Create(create) => {
                let answer = client.post(PATH, &create.body()).await?;
                show_token(context, &answer)?;
            }
            User::List => {
                let answer = client.get(PATH, &[]).await?;
                context.out.show(&answer, words)?;
            }
            User::Show(named) => {
                let answer = named.call(&client, Method::GET, None).await?;
                context.out.show(&answer, described)?;
            }
            User::Disable(named) => switch(context, &client, &named, false).await?,
            User::Enable(named) => switch(context, &client, &named, true).await?,
            User::Delete(named) => {
                let answer = named.call(&client, Method::DELETE, None).await?;
                let done = format!("{} deleted", named.user_id);
                context.out.show(&answer, |_| done)?;
            }
            User::Rotate(named) => {
                let body = json!({"rotate_token": true});
                let answer = named.call(&client, Method::PATCH, Some(&body)).await?;
                show_token(context, &answer)?;
            }
            User::Password {
                user_id: Some(user_id),
                tenant,
                remove,
            } => {
                let named = Named { user_id, tenant };
                set_password(context, &client, &named, remove).await?;
            }
            User::Password { user_id: None, .. } => set_own_password(context, &client).await?,
            User::Import { file } => return import(context, &client, &file).await,
            User::RecoverAdmin => unreachable!("taken above"),
        }
        Ok(Exit::Success)
    }
}

impl Named {
    async fn call(
        &self,
        client: &Client,
        method: Method,
        body: Option<&Value>,
    ) -> Result<Value, CliError> {
        self.call_below("", client, method, body).await
    }

    async fn call_below(
        &self,
        below: &str,
        client: &Client,
        method: Method,
        body: Option<&Value>,
    ) -> Result<Value, CliError> {
        let path = format!("{PATH}/{}{below}", segment(&self.user_id));
        let tenant = self.tenant.clone().map(|tenant| ("tenant_id", tenant));
        let query: Vec<(&str, String)> = tenant.into_iter().collect();
        client.call(method, &path, &query, body).await
    }
}

impl Create {
    fn body(self) -> Value {
        let mut body = Map::new();
        body.insert("user_id".into(), self.named.user_id.into());
        let texts = [
            ("tenant_id", self.named.tenant),
            ("email", self.email),
            ("runtime_id", self.runtime),
        ];
        for (name, value) in texts {
            body.extend(value.map(|value| (name.to_owned(), value.into())));
        }
        for (name, values) in [("roles", self.roles), ("scopes", self.scopes)] {
            if !values.is_empty() {
                body.insert(name.into(), json!(values));
            }
        }
        Value::Object(body)
    }
}

/// The token alone on stdout, so that it can go to a file without being seen.
fn show_token(context: &Context, answer: &Value) -> Result<(), CliError> {
    context.out.show(answer, |answer| text(answer, "token"))?;
    context.out.note("keep it: it is shown only here");
    Ok(())
}

async fn switch(
    context: &Context,
    client: &Client,
    named: &Named,
    enabled: bool,
) -> Result<(), CliError> {
    let body = json!({"enabled": enabled});
    let answer = named.call(client, Method::PATCH, Some(&body)).await?;
    let state = if enabled { "enabled" } else { "disabled" };
    let done = format!("{} {state}", named.user_id);
    context.out.show(&answer, |_| done)
}

async fn set_password(
    context: &Context,
    client: &Client,
    named: &Named,
    remove: bool,
) -> Result<(), CliError> {
    let password = match remove {
        true => Value::Null,
        false => asked(password::new).await?.into(),
    };
    let body = json!({"password": password});
    let answer = named
        .call_below("/password", client, Method::POST, Some(&body))
        .await?;
    let done = match remove {
        true => "has no password any more",
        false => "has a new password",
    };
    let done = format!("{} {done}", named.user_id);
    context.out.show(&answer, |_| done)
}

async fn set_own_password(context: &Context, client: &Client) -> Result<(), CliError> {
    let (current, password) = asked(|| Ok((password::current()?, password::new()?))).await?;
    let mut body = json!({"password": password});
    if !current.is_empty() {
        body["current_password"] = current.into();
    }
    let answer = client.post("api/gateway/me/password", &body).await?;
    context
        .out
        .show(&answer, |_| "you have a new password".to_owned())
}

/// Asks a person, off the runtime.
async fn asked<T: Send + 'static>(
    ask: impl FnOnce() -> Result<T, CliError> + Send + 'static,
) -> Result<T, CliError> {
    let asked = tokio::task::spawn_blocking(ask).await;
    asked.map_err(|error| CliError::Failed(error.to_string()))?
}

/// A list of texts as one.
pub(super) fn listed(value: &Value, name: &str) -> String {
    let items = value[name].as_array().into_iter().flatten();
    let texts: Vec<String> = items.filter_map(Value::as_str).map(plain).collect();
    texts.join(" ")
}

fn words(answer: &Value) -> String {
    let users = answer["users"].as_array().into_iter().flatten();
    let row = |user: &Value| {
        vec![
            text(user, "tenant_id"),
            text(user, "user_id"),
            listed(user, "roles"),
            text(user, "enabled"),
            text(user, "runtime_id"),
            instant(user, "created_at"),
        ]
    };
    table(
        &["TENANT", "USER", "ROLES", "ENABLED", "RUNTIME", "CREATED"],
        users.map(row).collect(),
    )
}

fn described(answer: &Value) -> String {
    let user = &answer["user"];
    facts(&[
        ("user", text(user, "user_id")),
        ("tenant", text(user, "tenant_id")),
        ("email", text(user, "email")),
        ("roles", listed(user, "roles")),
        ("scopes", listed(user, "scopes")),
        ("enabled", text(user, "enabled")),
        ("runtime", text(user, "runtime_id")),
        ("created", instant(user, "created_at")),
        ("updated", instant(user, "updated_at")),
    ])
}

/// The users of a registry file, as they stand in it.
fn read_registry(path: &Path) -> Result<Vec<Value>, CliError> {
    let file = File::open(path).map_err(CliError::io(format!("open {}", path.display())))?;
    let mut text = String::new();
    file.take(MAX_FILE_BYTES)
        .read_to_string(&mut text)
        .map_err(CliError::io(format!("read {}", path.display())))?;
    let registry: Option<Value> = serde_json::from_str(&text).ok();
    match registry {
        Some(mut registry) if registry["version"] == 2 && registry["users"].is_array() => {
            match registry["users"].take() {
                Value::Array(users) => Ok(users),
                _ => Ok(Vec::new()),
            }
        }
        _ => Err(CliError::Usage(format!(
            "{} is no registry of users, version 2, of an AbstractGateway",
            path.display()
        ))),
    }
}

async fn import(context: &Context, client: &Client, file: &Path) -> Result<Exit, CliError> {
    let users = read_registry(file)?;
    let (mut imported, mut refused) = (Vec::new(), Vec::new());
    for page in users.chunks(IMPORT_PAGE) {
        let path = format!("{PATH}/import");
        let mut answer = client.post(&path, &json!({"users": page})).await?;
        for (name, all) in [("imported", &mut imported), ("refused", &mut refused)] {
            if let Value::Array(some) = answer[name].take() {
                all.extend(some);
            }
        }
    }
    let exit = match refused.is_empty() {
        true => Exit::Success,
        false => Exit::Failure,
    };
    let answer = json!({"imported": imported, "refused": refused});
    context.out.show(&answer, |answer| {
        let count = |name: &str| answer[name].as_array().map_or(0, Vec::len);
        let mut lines = vec![format!(
            "{} imported, {} refused",
            count("imported"),
            count("refused")
        )];
        let each = answer["refused"].as_array().into_iter().flatten();
        lines.extend(each.map(|one| format!("{}: {}", text(one, "user"), text(one, "detail"))));
        lines.join("\n")
    })?;
    Ok(exit)
}

async fn recover_admin(context: &Context) -> Result<Exit, CliError> {
    if !context.data_dir_given {
        let text = "name the data directory of the stopped gateway with --data-dir";
        return Err(CliError::Usage(text.to_owned()));
    }
    let done = server::recover_admin(&context.config.data_dir).await;
    let path = done.map_err(|error| CliError::Failed(error.to_string()))?;
    let answer = json!({"token_file": path.display().to_string()});
    context.out.show(&answer, |answer| {
        format!("a new token is in {}", text(answer, "token_file"))
    })?;
    Ok(Exit::Success)
}
