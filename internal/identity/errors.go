package identity

import "errors"

// Conditions that callers tell apart. The errors that wrap them say which
// party, which file and what to do.
var (
	ErrNoCertificate    = errors.New("no certificate yet")
	ErrRevoked          = errors.New("key is revoked")
	ErrWrongTrustDomain = errors.New("wrong trust domain")
	ErrWrongRole        = errors.New("wrong role")
	ErrWrongParty       = errors.New("wrong party")
	ErrNotPinned        = errors.New("no root is pinned or trusted: a join code is needed")
	ErrUntrusted        = errors.New("certificate chain is not trusted")
	ErrExpired          = errors.New("certificate is not valid at this time")
	ErrOlder            = errors.New("revocation set is older than the one held")
	ErrUnwritten        = errors.New("revocation set is in force, and could not be written")
	ErrSignature        = errors.New("signature does not verify")
	ErrDamaged          = errors.New("identity is damaged")
)
