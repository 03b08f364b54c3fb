//! The OpenAPI document and its reader, Swagger UI, served from the binary under a policy that lets it load
//! nothing from elsewhere.

use std::sync::Arc;

use axum::Router;
use axum::extract::Path;
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::get;
use bytes::Bytes;
use http::{HeaderValue, header};
use utoipa::openapi::path::Operation;
use utoipa::openapi::response::{Response as Described, ResponseBuilder};
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{
    Components, ContentBuilder, InfoBuilder, OpenApi, OpenApiBuilder, PathItem, Ref, RefOr,
};
use utoipa_swagger_ui::Config;

use super::error::{ApiError, ErrorCode};
use super::state::App;

const SCHEME: &str = "gatewayBearerAuth";

/// Swagger UI styles itself with inline attributes and shows embedded icons; scripts are files of ours only.
const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; \
     img-src 'self' data:; connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The document before the routes are in it.
pub fn outline() -> OpenApi {
    let info = InfoBuilder::new()
        .title("Rungate")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some(
            "A durable gateway in front of GPU machines. A 2xx answer to a run or a command means that it is on disk. \
             Errors are `application/problem+json`; `code` names the cause.",
        ))
        .build();
    let mut components = Components::new();
    components.add_security_scheme(
        SCHEME,
        SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)),
    );
    components
        .schemas
        .insert("Problem".to_owned(), problem_schema());
    OpenApiBuilder::new()
        .info(info)
        .components(Some(components))
        .security(Some([SecurityRequirement::new(
            SCHEME,
            Vec::<String>::new(),
        )]))
        .build()
}

/// The shape of every error.
fn problem_schema() -> RefOr<utoipa::openapi::Schema> {
    use utoipa::openapi::schema::{ArrayBuilder, ObjectBuilder, SchemaType, Type};
    let text = || ObjectBuilder::new().schema_type(Type::String);
    let codes = ErrorCode::ALL.iter().map(|code| code.as_str());
    let field = ObjectBuilder::new()
        .property("field", text())
        .property("message", text())
        .property("code", text());
    let kinds = [Type::String, Type::Array, Type::Object];
    let detail = ObjectBuilder::new()
        .schema_type(SchemaType::from_iter(kinds))
        .description(Some(
            "A text; the list of wrong fields of a 422; or an object where the contract has one",
        ));
    let object = ObjectBuilder::new()
        .property("type", text())
        .property("title", text())
        .property("status", ObjectBuilder::new().schema_type(Type::Integer))
        .property("detail", detail)
        .property("instance", text())
        .property("code", text().enum_values(Some(codes)))
        .property("request_id", text())
        .property("errors", ArrayBuilder::new().items(field))
        .description(Some("RFC 9457 problem details"));
    for_required(object).into()
}

fn for_required(object: utoipa::openapi::schema::ObjectBuilder) -> utoipa::openapi::Schema {
    let required = [
        "type",
        "title",
        "status",
        "detail",
        "instance",
        "code",
        "request_id",
    ];
    let object = required
        .into_iter()
        .fold(object, |object, name| object.required(name));
    utoipa::openapi::Schema::Object(object.build())
}

/// Completes the document: every route's errors, unique operation ids, what is open.
pub fn complete(mut api: OpenApi) -> OpenApi {
    for (path, item) in &mut api.paths.paths {
        for operation in operations(item) {
            describe_errors(path, operation);
            describe_path(path, operation);
            describe_statuses(operation);
            let id = operation.operation_id.take().unwrap_or_default();
            operation.operation_id = Some(unique_id(path, &id));
        }
    }
    api
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    [
        &mut item.get,
        &mut item.post,
        &mut item.put,
        &mut item.patch,
        &mut item.delete,
    ]
    .into_iter()
    .filter_map(Option::as_mut)
}

/// Handlers have short names, so that the path makes an id unique: `get` of `/runs/{run_id}/ledger` is
/// `runs_run_id_ledger_read`.
fn unique_id(path: &str, handler: &str) -> String {
    let words = path
        .split(['/', '{', '}', '.'])
        .filter(|word| !word.is_empty());
    words.chain([handler]).collect::<Vec<_>>().join("_")
}

/// The parameters of the path, each a text.
fn describe_path(path: &str, operation: &mut Operation) {
    use utoipa::openapi::path::{ParameterBuilder, ParameterIn};
    use utoipa::openapi::schema::{ObjectBuilder, Type};
    let names = path
        .split('/')
        .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
    for name in names {
        let text = ObjectBuilder::new().schema_type(Type::String).build();
        let parameter = ParameterBuilder::new()
            .name(name)
            .parameter_in(ParameterIn::Path)
            .schema(Some(text));
        operation
            .parameters
            .get_or_insert_default()
            .push(parameter.build().into());
    }
}

fn describe_errors(path: &str, operation: &mut Operation) {
    let open = operation.security.is_some();
    let mut codes = vec![
        ErrorCode::HostNotAllowed,
        ErrorCode::TooManyRequests,
        ErrorCode::Internal,
    ];
    if !open {
        codes.push(ErrorCode::Unauthorized);
    }
    if operation.request_body.is_some() {
        codes.extend([
            ErrorCode::InvalidJson,
            ErrorCode::BodyTooLarge,
            ErrorCode::UnsupportedMediaType,
            ErrorCode::Overloaded,
        ]);
    }
    if path.contains('{') {
        codes.push(ErrorCode::NotFound);
    }
    if operation.request_body.is_some() || operation.parameters.is_some() {
        codes.push(ErrorCode::ValidationFailed);
    }
    for code in codes {
        let status = code.status().as_str().to_owned();
        let responses = &mut operation.responses.responses;
        responses
            .entry(status)
            .or_insert_with(|| RefOr::T(described(code, code.title(), path)));
    }
    for (status, response) in &mut operation.responses.responses {
        let RefOr::T(response) = response else {
            continue;
        };
        let is_error = status.starts_with(['4', '5']);
        if is_error && response.content.is_empty() {
            let content = ContentBuilder::new()
                .schema(Some(Ref::from_schema_name("Problem")))
                .build();
            response
                .content
                .insert("application/problem+json".to_owned(), content.into());
        }
    }
}

/// A response needs a description, by the standard: the status' own words where the route has none.
fn describe_statuses(operation: &mut Operation) {
    for (status, response) in &mut operation.responses.responses {
        let RefOr::T(response) = response else {
            continue;
        };
        if response.description.is_empty() {
            let status = http::StatusCode::from_bytes(status.as_bytes()).ok();
            let reason = status.and_then(|status| status.canonical_reason());
            response.description = reason.unwrap_or("As asked").to_owned();
        }
    }
}

fn described(code: ErrorCode, text: &str, path: &str) -> Described {
    let example = ApiError::new(code, text).problem("0f4e1d3c2b5a49788796a5b4c3d2e1f0", path);
    let content = ContentBuilder::new()
        .schema(Some(Ref::from_schema_name("Problem")))
        .example(Some(example))
        .build();
    ResponseBuilder::new()
        .description(text)
        .content("application/problem+json", content)
        .build()
}

/// `/openapi.json` and `/docs`.
pub fn router(api: &OpenApi) -> Router<App> {
    let document = Bytes::from(serde_json::to_vec(api).unwrap_or_default());
    let config = Arc::new(Config::from("/openapi.json"));
    Router::new()
        .route(
            "/openapi.json",
            get(move || async move { ([(header::CONTENT_TYPE, "application/json")], document) }),
        )
        .route("/docs", get(|| async { Redirect::permanent("/docs/") }))
        .route(
            "/docs/",
            get({
                let config = Arc::clone(&config);
                move || async move { file("index.html", config) }
            }),
        )
        .route(
            "/docs/{*file}",
            get(move |Path(name): Path<String>| async move { file(&name, config) }),
        )
}

fn file(name: &str, config: Arc<Config<'static>>) -> Response {
    let found = utoipa_swagger_ui::serve(name, config).ok().flatten();
    let Some(found) = found else {
        return ApiError::new(ErrorCode::NotFound, "Not Found").into_response();
    };
    let mut response = found.bytes.into_owned().into_response();
    let headers = response.headers_mut();
    if let Ok(kind) = HeaderValue::from_str(&found.content_type) {
        headers.insert(header::CONTENT_TYPE, kind);
    }
    let policy = HeaderValue::from_static(CONTENT_SECURITY_POLICY);
    headers.insert(header::CONTENT_SECURITY_POLICY, policy);
    headers.insert(
        header::REFERRER_POLICY,
        HeaderValue::from_static("no-referrer"),
    );
    response
}
