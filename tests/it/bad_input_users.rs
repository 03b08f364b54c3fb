//! The rows of `bad_input` about users, tokens, runtimes and tenants.

use crate::bad_input_table::{Case, bodies};

const USERS: &str = "/api/gateway/admin/users";
const TOKENS: &str = "/api/gateway/tokens";
const TENANTS: &str = "/api/gateway/admin/tenants";
const RESERVATIONS: &str = "/api/gateway/admin/runtime-reservations";

/// All of them.
pub fn rows() -> Vec<Case> {
    let mut rows = Vec::new();
    for path in ["/api/gateway/me", TOKENS, USERS, RESERVATIONS] {
        let case = Case::new("GET", path, path);
        rows.push(case.without_token().fails(401, "unauthorized"));
    }
    let rotate = "/api/gateway/admin/signing-keys/rotate";
    let case = Case::new("POST", rotate, rotate);
    rows.push(case.clone().without_token().fails(401, "unauthorized"));
    rows.push(case.by("GET").fails(405, "method_not_allowed"));
    rows.extend(users());
    rows.extend(one_user());
    rows.extend(tokens());
    rows.extend(runtimes());
    rows.extend(tenants());
    rows.extend(notifications());
    rows
}

fn notifications() -> Vec<Case> {
    let template = format!("{TENANTS}/{{tenant_id}}/notify");
    let path = |id: &str| format!("{TENANTS}/{id}/notify");
    let case = Case::new("GET", &template, &path("nobody"));
    let mut rows = vec![
        case.clone().without_token().fails(401, "unauthorized"),
        case.fails(404, "tenant_not_found"),
    ];
    rows.extend(bodies("PUT", &template, &path("default")));
    let put = |id: &str, body: &str| Case::new("PUT", &template, &path(id)).json(body);
    rows.push(put("nobody", "{}").fails(404, "tenant_not_found"));
    for body in [
        r#"{"email":{}}"#,
        r#"{"ntfy":true}"#,
        r#"{"ntfy":{}}"#,
        r#"{"ntfy":{"topic":"a/b"}}"#,
        r#"{"ntfy":{"topic":""}}"#,
        r#"{"ntfy":{"topic":"a\r\nb"}}"#,
        r#"{"ntfy":{"topic":"t","url":"ftp://x/"}}"#,
        r#"{"ntfy":{"topic":"t","url":"http://u:p@x/"}}"#,
        r#"{"ntfy":{"topic":"t","url":"http://x/?a=b"}}"#,
        r#"{"ntfy":{"topic":"t","events":["exploded"]}}"#,
        r#"{"ntfy":{"topic":"t","events":"failed"}}"#,
        r#"{"ntfy":{"topic":"t","token":"a b"}}"#,
        r#"{"ntfy":{"topic":"t","token":7}}"#,
        r#"{"ntfy":{"topic":"t","by_settings":true}}"#,
        r#"{"webhook":{}}"#,
        r#"{"webhook":{"url":"nonsense"}}"#,
        r#"{"webhook":{"url":"http://x/","events":["test"]}}"#,
        r#"{"webhook":{"url":"http://x/","token":"t"}}"#,
    ] {
        rows.push(put("default", body).fails(422, "validation_failed"));
    }
    let template = format!("{template}/test");
    let test = |id: &str| Case::new("POST", &template, &format!("{}/test", path(id)));
    rows.push(test("nobody").fails(404, "tenant_not_found"));
    rows.push(test("default").fails(409, "nothing_to_test"));
    rows
}

fn tenants() -> Vec<Case> {
    let case = Case::new("GET", TENANTS, TENANTS);
    let mut rows = vec![case.without_token().fails(401, "unauthorized")];
    rows.extend(bodies("POST", TENANTS, TENANTS));
    for body in [
        "{}",
        r#"{"tenant_id":"__"}"#,
        r#"{"tenant_id":"t","weight":0}"#,
        r#"{"tenant_id":"t","weight":10001}"#,
        r#"{"tenant_id":"t","weight":1.5}"#,
        r#"{"tenant_id":"t","name":""}"#,
        r#"{"tenant_id":"t","quotas":[]}"#,
        r#"{"tenant_id":"t","quotas":{"gpus":-1}}"#,
        r#"{"tenant_id":"t","quotas":{"gpus":"2"}}"#,
        r#"{"tenant_id":"t","quotas":{"artifact_bytes":1}}"#,
        r#"{"tenant_id":"t","enabled":1}"#,
        r#"{"tenant_id":"t","extra":1}"#,
    ] {
        let case = Case::new("POST", TENANTS, TENANTS).json(body);
        rows.push(case.fails(422, "validation_failed"));
    }
    let template = format!("{TENANTS}/{{tenant_id}}");
    let path = |id: &str| format!("{TENANTS}/{id}");
    rows.extend(bodies("PATCH", &template, &path("default")));
    let case = Case::new("GET", &template, &path("nobody"));
    rows.push(case.fails(404, "tenant_not_found"));
    let patch = |id: &str, body: &str| Case::new("PATCH", &template, &path(id)).json(body);
    rows.push(patch("nobody", "{}").fails(404, "tenant_not_found"));
    rows.push(patch("default", r#"{"enabled":false}"#).fails(400, "tenant_protected"));
    rows.push(patch("default", r#"{"tenant_id":"t"}"#).fails(422, "validation_failed"));
    rows.push(patch("default", r#"{"weight":0}"#).fails(422, "validation_failed"));
    rows
}

fn users() -> Vec<Case> {
    let mut rows = bodies("POST", USERS, USERS);
    let long = format!(r#"{{"user_id":"{}"}}"#, "u".repeat(65));
    for body in [
        "{}",
        r#"{"user_id":""}"#,
        r#"{"user_id":"..."}"#,
        r#"{"user_id":7}"#,
        r#"{"user_id":"u","extra":1}"#,
        r#"{"user_id":"u","roles":"user"}"#,
        r#"{"user_id":"u","roles":["root"]}"#,
        r#"{"user_id":"u","scopes":["runs:*"]}"#,
        r#"{"user_id":"u","enabled":"yes"}"#,
        r#"{"user_id":"u","email":"a@b@c.d"}"#,
        r#"{"user_id":"u","email":"nobody"}"#,
        r#"{"user_id":"u","tenant_id":"__"}"#,
        r#"{"user_id":"u","runtime_id":"\u0000"}"#,
        r#"{"user_id":"u","token":"short"}"#,
        r#"{"user_id":"u","token":"rgt_user_with-a-wrong-checksum"}"#,
        long.as_str(),
    ] {
        let case = Case::new("POST", USERS, USERS).json(body);
        rows.push(case.fails(422, "validation_failed"));
    }
    let case = Case::new("POST", USERS, USERS);
    rows.push(
        case.json(r#"{"user_id":"admin"}"#)
            .fails(400, "user_exists"),
    );
    let import = format!("{USERS}/import");
    rows.extend(bodies("POST", &import, &import));
    for body in ["{}", r#"{"users":{}}"#, r#"{"users":[1]}"#] {
        let case = Case::new("POST", &import, &import).json(body);
        rows.push(case.fails(422, "validation_failed"));
    }
    rows
}

fn one_user() -> Vec<Case> {
    let template = format!("{USERS}/{{user_id}}");
    let path = |id: &str| format!("{USERS}/{id}");
    let mut rows = bodies("PATCH", &template, &path("admin"));
    for id in ["nobody", "admin?tenant_id=other"] {
        for method in ["GET", "DELETE"] {
            let case = Case::new(method, &template, &path(id));
            rows.push(case.fails(404, "user_not_found"));
        }
        let case = Case::new("PATCH", &template, &path(id)).json("{}");
        rows.push(case.fails(404, "user_not_found"));
    }
    let patch = |body: &str| Case::new("PATCH", &template, &path("admin")).json(body);
    rows.push(patch(r#"{"user_id":"b"}"#).fails(422, "validation_failed"));
    rows.push(patch(r#"{"quotas":{"queued_runs":true}}"#).fails(422, "validation_failed"));
    rows.push(patch(r#"{"rotate_token":1}"#).fails(422, "validation_failed"));
    rows.push(patch(r#"{"enabled":false}"#).fails(400, "user_protected"));
    rows.push(patch(r#"{"rotate_token":true}"#).fails(400, "user_protected"));
    let delete = Case::new("DELETE", &template, &path("admin"));
    rows.push(delete.fails(400, "user_protected"));
    rows
}

fn tokens() -> Vec<Case> {
    let mut rows = bodies("POST", TOKENS, TOKENS);
    for body in [
        "{}",
        r#"{"name":""}"#,
        r#"{"name":"n","scopes":["all"]}"#,
        r#"{"name":"n","expires_in_s":0}"#,
        r#"{"name":"n","expires_in_s":315576001}"#,
        r#"{"name":"n","token":"of my own choice"}"#,
    ] {
        let case = Case::new("POST", TOKENS, TOKENS).json(body);
        rows.push(case.fails(422, "validation_failed"));
    }
    let template = format!("{TOKENS}/{{token_id}}");
    let case = Case::new("DELETE", &template, &format!("{TOKENS}/tok_0"));
    rows.push(case.fails(404, "token_not_found"));
    rows
}

fn runtimes() -> Vec<Case> {
    let mut rows = Vec::new();
    for verb in ["transfer", "purge"] {
        let template = format!("{RESERVATIONS}/{{runtime_id}}/{verb}");
        let none = format!("{RESERVATIONS}/nothing/{verb}");
        let held = format!("{RESERVATIONS}/default/{verb}");
        rows.extend(bodies("POST", &template, &none));
        let post = |path: &str, body: &str| Case::new("POST", &template, path).json(body);
        rows.push(post(&none, "{}").fails(404, "runtime_not_found"));
        rows.push(post(&held, "{}").fails(422, "validation_failed"));
        let wrong = r#"{"confirm_runtime_id":"x","target_user_id":"admin"}"#;
        rows.push(post(&held, wrong).fails(400, "confirmation_required"));
    }
    let template = format!("{RESERVATIONS}/{{runtime_id}}/purge");
    let purge = |body: &str| {
        let path = format!("{RESERVATIONS}/default/purge");
        Case::new("POST", &template, &path).json(body)
    };
    let kept = r#"{"confirm_runtime_id":"default","delete_data":false}"#;
    rows.push(purge(kept).fails(400, "confirmation_required"));
    let held = r#"{"confirm_runtime_id":"default"}"#;
    rows.push(purge(held).fails(409, "runtime_in_use"));
    rows
}
