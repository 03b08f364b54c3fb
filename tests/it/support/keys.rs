//! Real key pairs of three kinds, and tokens signed with them, whatever these say.

use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, RsaKeyPair,
};
use jsonwebtoken::jwk::Jwk;
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use serde_json::{Value, json};

/// A key pair and its id.
#[derive(Clone)]
pub struct Key {
    pub kid: String,
    pub algorithm: Algorithm,
    pub secret: EncodingKey,
}

/// The RSAPrivateKey in a PKCS #8 of a 2048-bit key: what stands before it is always this long.
const PKCS8_RSA_2048_HEADER_BYTES: usize = 26;

impl Key {
    pub fn new(kid: &str, algorithm: Algorithm) -> Key {
        let secret = match algorithm {
            Algorithm::RS256 => {
                let pair = RsaKeyPair::generate(KeySize::Rsa2048).unwrap();
                let der: Pkcs8V1Der = pair.as_der().unwrap();
                EncodingKey::from_rsa_der(&der.as_ref()[PKCS8_RSA_2048_HEADER_BYTES..])
            }
            Algorithm::ES256 => {
                let random = SystemRandom::new();
                let algorithm = &ECDSA_P256_SHA256_FIXED_SIGNING;
                let der = EcdsaKeyPair::generate_pkcs8(algorithm, &random).unwrap();
                EncodingKey::from_ec_der(der.as_ref())
            }
            _ => {
                let der = Ed25519KeyPair::generate().unwrap().to_pkcs8v1().unwrap();
                EncodingKey::from_ed_der(der.as_ref())
            }
        };
        Key {
            kid: kid.to_owned(),
            algorithm,
            secret,
        }
    }

    pub fn jwk(&self) -> Value {
        let jwk = Jwk::from_encoding_key(&self.secret, self.algorithm).unwrap();
        let mut jwk = serde_json::to_value(jwk).unwrap();
        jwk["kid"] = json!(self.kid);
        jwk["use"] = json!("sig");
        jwk
    }

    /// A token of these claims, whatever they are.
    pub fn sign(&self, claims: &Value) -> String {
        self.sign_as("at+jwt", claims)
    }

    pub fn sign_as(&self, kind: &str, claims: &Value) -> String {
        let mut header = Header::new(self.algorithm);
        header.typ = Some(kind.to_owned());
        header.kid = Some(self.kid.clone());
        encode(&header, claims, &self.secret).unwrap()
    }
}
