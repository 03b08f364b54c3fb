//! The rows of `bad_input` about logins, sessions and passwords.

use crate::bad_input_table::{Case, bodies};

const LOGIN: &str = "/api/gateway/session/login";
const LOGOUT: &str = "/api/gateway/session/logout";
const SESSIONS: &str = "/api/gateway/sessions";
const OWN_PASSWORD: &str = "/api/gateway/me/password";
const USERS: &str = "/api/gateway/admin/users";

/// All of them.
pub fn rows() -> Vec<Case> {
    let mut rows = Vec::new();
    for (method, path) in [("POST", LOGOUT), ("GET", SESSIONS), ("POST", OWN_PASSWORD)] {
        let case = Case::new(method, path, path);
        rows.push(case.without_token().fails(401, "unauthorized"));
    }
    rows.extend(logins());
    rows.extend(sessions());
    rows.extend(passwords());
    rows
}

fn logins() -> Vec<Case> {
    let mut rows = bodies("POST", LOGIN, LOGIN);
    let long = format!(r#"{{"user_id":"u","password":"{}"}}"#, "p".repeat(1_025));
    for body in [
        "{}",
        r#"{"user_id":"u"}"#,
        r#"{"token":"t"}"#,
        r#"{"user_id":"u","token":"t","password":"p"}"#,
        r#"{"user_id":"u","token":""}"#,
        r#"{"user_id":"u","password":7}"#,
        r#"{"user_id":"","token":"t"}"#,
        r#"{"user_id":"u","token":"t","remember":"yes"}"#,
        r#"{"user_id":"u","token":"t","extra":1}"#,
        r#"{"user_id":"u","tenant_id":"\u0000","token":"t"}"#,
        long.as_str(),
    ] {
        let case = Case::new("POST", LOGIN, LOGIN).json(body);
        rows.push(case.fails(422, "validation_failed"));
    }
    let post = |body: &str| Case::new("POST", LOGIN, LOGIN).json(body);
    let wrong = [
        r#"{"user_id":"admin","token":"rgt_user_x"}"#,
        r#"{"user_id":"admin","password":"p"}"#,
        r#"{"user_id":"nobody","password":"p"}"#,
    ];
    for body in wrong {
        rows.push(post(body).fails(401, "login_failed"));
    }
    let unsaid = Case::new("POST", LOGIN, LOGIN).bytes(wrong[0].as_bytes());
    rows.push(unsaid.fails(415, "unsupported_media_type"));
    let cross = post(wrong[0]).header("sec-fetch-site", "cross-site");
    rows.push(cross.fails(403, "cross_site"));
    rows
}

fn sessions() -> Vec<Case> {
    let template = format!("{SESSIONS}/{{session_id}}");
    let path = format!("{SESSIONS}/ses_0");
    let end = Case::new("DELETE", &template, &path);
    let nobodys = Case::new("DELETE", &template, &format!("{path}?user_id=nobody"));
    let list = Case::new("GET", SESSIONS, &format!("{SESSIONS}?user_id=nobody"));
    let unknown = format!("{SESSIONS}?user_id=admin&tenant_id=nowhere");
    vec![
        end.fails(404, "session_not_found"),
        nobodys.fails(404, "user_not_found"),
        list.fails(404, "user_not_found"),
        Case::new("GET", SESSIONS, &unknown).fails(404, "user_not_found"),
    ]
}

fn passwords() -> Vec<Case> {
    let mut rows = bodies("POST", OWN_PASSWORD, OWN_PASSWORD);
    let admins = format!("{USERS}/{{user_id}}/password");
    let admin = format!("{USERS}/admin/password");
    rows.extend(bodies("POST", &admins, &admin));
    let long = format!(r#"{{"password":"{}"}}"#, "p".repeat(257));
    for body in [
        "{}",
        r#"{"password":"elevenchars"}"#,
        r#"{"password":["correct horse battery"]}"#,
        r#"{"password":"correct horse\u0000battery"}"#,
        r#"{"password":"correct horse battery","user_id":"u"}"#,
        long.as_str(),
    ] {
        for (template, path) in [(OWN_PASSWORD, OWN_PASSWORD), (&*admins, &*admin)] {
            let case = Case::new("POST", template, path).json(body);
            rows.push(case.fails(422, "validation_failed"));
        }
    }
    let good = r#"{"password":"correct horse battery"}"#;
    for (template, path) in [(OWN_PASSWORD, OWN_PASSWORD), (&*admins, &*admin)] {
        let case = Case::new("POST", template, path).json(good);
        rows.push(case.fails(400, "user_protected"));
    }
    let nobody = format!("{USERS}/nobody/password");
    let case = Case::new("POST", &admins, &nobody).json(good);
    rows.push(case.fails(404, "user_not_found"));
    rows
}
