//! Bodies that take their time: whoever was let in and ended before the body came writes nothing more.

use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::isolation::{call, user};
use crate::support::browser::{Browser, LOGOUT};
use crate::support::{Gateway, Options};

const START: &str = "/api/gateway/runs/start";
const BODY: &str = r#"{"job":{"service_type":"t","payload":{}}}"#;

/// A start whose body is still to come, and whose sender was let in: the gateway has asked for the body.
struct Begun(TcpStream);

impl Begun {
    async fn begin(gateway: &Gateway, credentials: &[(&str, &str)]) -> Begun {
        let mut head = format!(
            "POST {START} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nexpect: 100-continue\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n",
            BODY.len()
        );
        for (name, value) in credentials {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        let mut connection = TcpStream::connect(gateway.addr()).await.unwrap();
        connection.write_all(head.as_bytes()).await.unwrap();
        connection.write_all(b"\r\n").await.unwrap();
        let mut said = Vec::new();
        while !said.ends_with(b"100 Continue\r\n\r\n") {
            let read = connection.read_buf(&mut said).await.unwrap();
            assert!(read > 0, "{}", String::from_utf8_lossy(&said));
        }
        Begun(connection)
    }

    /// The status of the answer.
    async fn end(mut self) -> String {
        self.0.write_all(BODY.as_bytes()).await.unwrap();
        let mut answer = String::new();
        self.0.read_to_string(&mut answer).await.unwrap();
        answer[9..12].to_owned()
    }
}

async fn runs(gateway: &Gateway, token: &str) -> usize {
    let list = call(gateway, token, Method::GET, "/api/gateway/runs", None).await;
    list.expect(200)["items"].as_array().unwrap().len()
}

#[tokio::test]
async fn who_is_ended_while_its_body_is_awaited_writes_nothing() {
    let gateway = Gateway::start(Options::default()).await;
    let ann = user(&gateway, json!({"user_id": "ann"})).await;
    let bearer = format!("Bearer {ann}");
    let by_token = [("authorization", bearer.as_str())];
    let waited = Begun::begin(&gateway, &by_token).await;
    assert_eq!(waited.end().await, "200", "waiting alone harms nobody");

    let browser = Browser::by_token(&gateway, "ann", &ann).await;
    let by_session = [
        ("x-abstractgateway-session", browser.secret.as_str()),
        ("x-abstractgateway-csrf", browser.csrf.as_str()),
    ];
    let begun = Begun::begin(&gateway, &by_session).await;
    let out = browser.call(&gateway, Method::POST, LOGOUT, None).await;
    out.expect(200);
    assert_eq!(begun.end().await, "401", "after the logout");

    let patch = async |body: Value| {
        let path = "/api/gateway/admin/users/ann";
        let changed = call(&gateway, gateway.token(), Method::PATCH, path, Some(body)).await;
        changed.expect(200);
    };
    let begun = Begun::begin(&gateway, &by_token).await;
    patch(json!({"roles": ["viewer"]})).await;
    assert_eq!(begun.end().await, "401", "without the role");
    patch(json!({"roles": ["user"]})).await;
    let begun = Begun::begin(&gateway, &by_token).await;
    patch(json!({"enabled": false})).await;
    assert_eq!(begun.end().await, "401", "disabled");
    patch(json!({"enabled": true})).await;
    assert_eq!(runs(&gateway, &ann).await, 1);
}
