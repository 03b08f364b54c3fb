//! A browser as far as sessions go: it keeps the cookies it is given, sends them, and shows the CSRF token on writes.

use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};

use super::{Answer, Gateway, answer};

pub const LOGIN: &str = "/api/gateway/session/login";
pub const LOGOUT: &str = "/api/gateway/session/logout";

/// A logged-in browser.
#[derive(Clone, Debug)]
pub struct Browser {
    /// The whole `Set-Cookie` lines.
    pub lines: Vec<String>,
    pub cookie: String,
    /// The session cookie's value.
    pub secret: String,
    pub csrf: String,
    /// The answer to the login.
    pub body: Value,
}

impl Browser {
    /// Logs in with `{"user_id", "token" | "password", …}`.
    pub async fn login(gateway: &Gateway, body: Value) -> Browser {
        let answer = answer(gateway.bare(Method::POST, LOGIN).json(&body)).await;
        Browser::of(&answer)
    }

    pub async fn by_token(gateway: &Gateway, user: &str, token: &str) -> Browser {
        Browser::login(gateway, json!({"user_id": user, "token": token})).await
    }

    /// From the answer to a login.
    #[track_caller]
    pub fn of(answer: &Answer) -> Browser {
        assert_eq!(answer.status, 200, "{}", answer.text);
        let lines: Vec<String> = answer
            .headers
            .get_all("set-cookie")
            .iter()
            .map(|line| line.to_str().unwrap().to_owned())
            .collect();
        let pairs: Vec<&str> = lines
            .iter()
            .map(|line| line.split(';').next().unwrap())
            .collect();
        let value = |ending: &str| {
            let of = |pair: &&str| {
                let (name, value) = pair.split_once('=')?;
                name.ends_with(ending).then(|| value.to_owned())
            };
            pairs.iter().find_map(of).expect("the cookie")
        };
        Browser {
            cookie: pairs.join("; "),
            secret: value("_session"),
            csrf: value("_csrf"),
            body: answer.json.clone(),
            lines,
        }
    }

    /// A request with the cookies alone.
    pub fn bare(&self, gateway: &Gateway, method: Method, path: &str) -> RequestBuilder {
        gateway.bare(method, path).header("cookie", &self.cookie)
    }

    /// A request as the console makes it.
    pub fn request(&self, gateway: &Gateway, method: Method, path: &str) -> RequestBuilder {
        let request = self.bare(gateway, method, path);
        request.header("x-abstractgateway-csrf", &self.csrf)
    }

    pub async fn call(
        &self,
        gateway: &Gateway,
        method: Method,
        path: &str,
        body: Option<Value>,
    ) -> Answer {
        let request = self.request(gateway, method, path);
        answer(match body {
            Some(body) => request.json(&body),
            None => request,
        })
        .await
    }

    /// What `GET /me` answers now.
    pub async fn status(&self, gateway: &Gateway) -> u16 {
        let me = self.bare(gateway, Method::GET, "/api/gateway/me");
        answer(me).await.status.as_u16()
    }
}
