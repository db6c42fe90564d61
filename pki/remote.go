package pki

import (
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"sallyport/internal/doors"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// The protocol between a gateway and an authority in a process of its own:
// HTTP/1.1 and JSON in TLS 1.3 with certificates of both sides, on TCP or a
// unix socket.
const (
	alpn = "sallyport-pki/1"

	pathRegister    = "/v1/register"
	pathState       = "/v1/state"
	pathGateway     = "/v1/gateway"
	pathIssue       = "/v1/issue"
	pathRevocations = "/v1/revocations"
	pathRollover    = "/v1/rollover"

	// maxSmall bounds every body but those with revocation sets.
	maxSmall = 64 << 10
	// maxState bounds a state: a revocation set and the certificates.
	maxState = 2 * wire.MaxRevocations
)

// serverName is the DNS name in the authority's own leaf. No party can have
// it: theirs are <uuid>.<role>.<td> and <name>.<tenant>.node.<td>.
func serverName(trustDomain string) string { return "pki." + trustDomain }

// registerRequest makes the key of the TLS connection that of a gateway.
type registerRequest struct {
	ID      wire.ID `json:"id"`
	TokenID string  `json:"token_id"`
	Token   string  `json:"token"`
}

type gatewayRequest struct {
	CSR []byte `json:"csr"`
}

// revocationsRequest is a set, as gateways sent it before they said what it follows.
type revocationsRequest struct {
	wire.Revocations

	After *int64 `json:"after,omitempty"` // number of the last set, whose keys this one has too
}

// rolloverRequest is a step of a rollover: rotate, follow, abort or finish.
type rolloverRequest struct {
	Step    string `json:"step"`
	Kind    string `json:"kind,omitempty"`     // of rotate
	Root    []byte `json:"root,omitempty"`     // of follow: SHA-256 of the root's certificate
	Alone   bool   `json:"alone,omitempty"`    // of follow
	Forget  bool   `json:"forget,omitempty"`   // of finish
	AtLeast int64  `json:"at_least,omitempty"` // the highest trust document seen
}

type chainAnswer struct {
	Chain [][]byte `json:"chain"`
}

// Snapshot is what a gateway must know of its authority before it can do
// anything.
type Snapshot struct {
	TrustDomain string         `json:"trust_domain"`
	Root        []byte         `json:"root"`        // DER, the one that join codes pin
	Revocations *wire.Envelope `json:"revocations"` // the highest set that was signed
	Trust       *wire.Envelope `json:"trust"`       // the newest trust document
	CA          wire.CAState   `json:"ca"`
}

func (s Snapshot) root() (*x509.Certificate, error) {
	root, err := x509.ParseCertificate(s.Root)
	if err == nil && s.TrustDomain == "" {
		err = errors.New("there is no trust domain")
	}
	return root, err
}

// problem is the body of every refusal.
type problem struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

// ErrUnregistered says that the authority does not know a gateway's key.
var ErrUnregistered = errors.New("the certificate authority does not know this gateway")

// codeFailed is that of what was not refused.
const codeFailed = "failed"

// codes are the conditions that keep their meaning on the way to the gateway.
var codes = []struct {
	code   string
	err    error
	status int
}{
	{"unregistered", ErrUnregistered, http.StatusForbidden},
	{"revoked", identity.ErrRevoked, http.StatusForbidden}, // before refused, which wraps it
	{"refused", ErrRefused, http.StatusForbidden},
	{"door-refused", doors.ErrRefused, http.StatusForbidden},
	{"rollover", ErrRollover, http.StatusConflict},
	{"external", ErrExternal, http.StatusBadGateway},
	{"older", identity.ErrOlder, http.StatusConflict},
	{"too-large", wire.ErrTooLarge, http.StatusRequestEntityTooLarge},
	{"malformed", wire.ErrMalformed, http.StatusBadRequest},
}

// remoteError is a refusal of the authority at the gateway.
type remoteError struct {
	problem
	cause error
}

func (e *remoteError) Error() string { return e.Message }
func (e *remoteError) Unwrap() error { return e.cause }

func (p problem) err() error {
	for _, c := range codes {
		if c.code == p.Code {
			return &remoteError{p, c.err}
		}
	}
	return &remoteError{p, nil}
}

// GatewayPrefix begins every gateway code.
const GatewayPrefix = "spg1."

// maxCode bounds a gateway code: a certificate and a token.
const maxCode = 16 << 10

// GatewayCode is what a gateway needs to be known to its authority: whom to
// trust, and a token that serves one key. It is a secret.
type GatewayCode struct {
	TrustDomain string `json:"td"`
	Root        []byte `json:"root"` // DER
	TokenID     string `json:"tid"`
	Token       string `json:"tok"`
}

// Encode returns the printed form.
func (c GatewayCode) Encode() (string, error) {
	b, err := json.Marshal(c)
	if err != nil {
		return "", err
	}
	return GatewayPrefix + base64.RawURLEncoding.EncodeToString(b), nil
}

// ErrGatewayCode says that a gateway code is malformed.
var ErrGatewayCode = errors.New("malformed gateway code")

// ParseGatewayCode reads the printed form; surrounding white space is ignored.
// The errors never repeat the code.
func ParseGatewayCode(s string) (c GatewayCode, err error) {
	s = strings.TrimSpace(s)
	body, ok := strings.CutPrefix(s, GatewayPrefix)
	switch {
	case strings.HasPrefix(s, wire.JoinPrefix):
		return c, fmt.Errorf("%w: it is a join code of a node or an RCP; `sallyport ca gateway add`, where the certificate authority runs, makes one for a gateway", ErrGatewayCode)
	case !ok:
		return c, fmt.Errorf("%w: it does not begin with %q", ErrGatewayCode, GatewayPrefix)
	case len(s) > maxCode:
		return c, fmt.Errorf("%w: longer than %d characters", ErrGatewayCode, maxCode)
	}
	b, err := base64.RawURLEncoding.DecodeString(body)
	if err != nil {
		return c, fmt.Errorf("%w: cut off or altered in copying", ErrGatewayCode)
	}
	if err := json.Unmarshal(b, &c); err != nil {
		return GatewayCode{}, fmt.Errorf("%w: cut off or altered in copying", ErrGatewayCode)
	}
	root, err := x509.ParseCertificate(c.Root)
	if err != nil || !root.IsCA || root.CheckSignatureFrom(root) != nil {
		return GatewayCode{}, fmt.Errorf("%w: it pins no root", ErrGatewayCode)
	}
	if c.TrustDomain == "" || !validTokenID(c.TokenID) || c.Token == "" {
		return GatewayCode{}, fmt.Errorf("%w: a part of it is missing", ErrGatewayCode)
	}
	return c, nil
}

// Gateway is one gateway that the authority knows.
type Gateway struct {
	ID      wire.ID      `json:"id"`
	Key     wire.KeyHash `json:"key"`
	TokenID string       `json:"token_id"`
	Added   time.Time    `json:"added"`
	Until   time.Time    `json:"until,omitzero"`   // end of its last leaf
	Removed time.Time    `json:"removed,omitzero"` // its key is revoked since
}
