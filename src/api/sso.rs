//! From a token of the single sign-on issuer to a user of ours: known already, or made known durably by the same
//! event as any other, and kept in step with the roles that the issuer gives.

use jsonwebtoken::Header;

use super::authenticate::Asking;
use super::error::{ApiError, ErrorCode};
use super::state::App;
use crate::auth::Principal;
use crate::auth::sso::Person;
use crate::coordinator::SubmitError;
use crate::domain::command::Rejection;
use crate::domain::identity::{
    IdentityCommand, IdentityRejection, Profile, ProfileChange, Role, User,
};
use crate::domain::ids::PlaneId;
use crate::domain::tenant::{QuotasChange, UserAllowanceChange};

/// The keyed hash of the token that was shown, and with which request.
type Showing<'a> = (&'a [u8; 32], &'a Asking<'a>);

/// Who shows a token of the issuer; `None` when it is not accepted, or names nobody who is let in.
pub async fn principal(
    app: &App,
    (header, token): (&Header, &[u8]),
    digest: &[u8; 32],
    asking: &Asking<'_>,
) -> Result<Option<Principal>, ApiError> {
    let Some(sso) = app.auth.sso() else {
        return Ok(None);
    };
    let person = sso
        .verify(token, header, asking.at)
        .await
        .map_err(|error| {
            ApiError::new(ErrorCode::IssuerUnavailable, error.to_string()).retry_after(10)
        })?;
    let Some(person) = person else {
        return Ok(None);
    };
    if !app.ledger.admits(&person.key.tenant)? {
        return Ok(None);
    }
    let user = match app.ledger.user(&person.key)? {
        Some(user) => in_step(app, user, &person, (digest, asking)).await?,
        None => make_known(app, &person, (digest, asking)).await?,
    };
    Ok(user.and_then(|user| Principal::of_person(&user, &person, digest)))
}

async fn make_known(
    app: &App,
    person: &Person,
    shown: Showing<'_>,
) -> Result<Option<User>, ApiError> {
    if !person.provision {
        return Ok(None);
    }
    let profile = Profile {
        email: person.email.clone(),
        roles: person.first_roles.clone(),
        scopes: Vec::new(),
        enabled: true,
        runtime: person.key.user.clone(),
    };
    let command = IdentityCommand::ProvisionUser {
        key: person.key.clone(),
        profile,
    };
    match submit(app, person, command, shown).await {
        // Another request was first.
        Ok(())
        | Err(SubmitError::Rejected(Rejection::Identity(IdentityRejection::UserExists(_)))) => {
            Ok(app.ledger.user(&person.key)?)
        }
        Err(SubmitError::Rejected(rejection)) => {
            tracing::warn!(user = %person.key, %rejection, "a user of the issuer cannot be made known");
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

/// The issuer's word on roles counts from the first token that is younger than the last change of the user: an older
/// token that is still good turns nothing back.
async fn in_step(
    app: &App,
    user: User,
    person: &Person,
    shown: Showing<'_>,
) -> Result<Option<User>, ApiError> {
    let younger = person
        .issued_at
        .is_some_and(|issued| issued > user.updated_at);
    let roles = match &person.roles {
        Some(roles) if younger && user.profile.enabled && !same(roles, &user.profile.roles) => {
            roles
        }
        _ => return Ok(Some(user)),
    };
    let command = IdentityCommand::UpdateUser {
        key: person.key.clone(),
        change: ProfileChange {
            roles: Some(roles.clone()),
            ..ProfileChange::default()
        },
        quotas: QuotasChange::default(),
        allowance: UserAllowanceChange::default(),
        rotate: None,
    };
    match submit(app, person, command, shown).await {
        Ok(()) | Err(SubmitError::Rejected(_)) => Ok(app.ledger.user(&person.key)?),
        Err(error) => Err(error.into()),
    }
}

/// In whatever order.
fn same(left: &[Role], right: &[Role]) -> bool {
    left.len() == right.len() && left.iter().all(|role| right.contains(role))
}

async fn submit(
    app: &App,
    person: &Person,
    command: IdentityCommand,
    (digest, asking): Showing<'_>,
) -> Result<(), SubmitError> {
    let user = (PlaneId::ROOT, &person.key);
    asking.submit(app, user, Some(digest), command).await
}
