package wire

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
)

// JoinPrefix begins every join code. Any other value of a *_JOIN variable is a
// file name.
const JoinPrefix = "sp1."

const maxJoinCode = 8 << 10

// ErrJoinCode says that a join code is malformed.
var ErrJoinCode = errors.New("malformed join code")

// ErrJoinRole says that a join code is for a party of another role.
var ErrJoinRole = errors.New("wrong role")

// JoinCode is what a party needs to enrol: where to go, whom to trust, and,
// unless an operator will grant by hand, a token. It is a secret while it has one.
type JoinCode struct {
	TrustDomain string   `json:"td"`
	Root        KeyHash  `json:"root"`           // the pinned root's SPKI
	Role        Role     `json:"role"`           // node or rcp
	Name        string   `json:"name,omitempty"` // what the gateway will call the party
	Addresses   []string `json:"addr,omitempty"` // host:port of upstreams to dial; never makes a dialler of an RCP
	TokenID     string   `json:"tid,omitempty"`  // of the gateway's record of this code
	Token       string   `json:"tok,omitempty"`  // empty: an operator grants by hand
}

// Encode returns the printed form.
func (c JoinCode) Encode() (string, error) {
	b, err := json.Marshal(c)
	if err != nil {
		return "", err
	}
	return JoinPrefix + base64.RawURLEncoding.EncodeToString(b), nil
}

// ParseJoinCode reads the printed form; surrounding white space is ignored.
// The errors never repeat the code, which is a secret.
func ParseJoinCode(s string) (JoinCode, error) {
	var c JoinCode
	s = strings.TrimSpace(s)
	body, ok := strings.CutPrefix(s, JoinPrefix)
	if !ok {
		return c, fmt.Errorf("%w: it does not begin with %q", ErrJoinCode, JoinPrefix)
	}
	if len(s) > maxJoinCode {
		return c, fmt.Errorf("%w: longer than %d characters", ErrJoinCode, maxJoinCode)
	}
	b, err := base64.RawURLEncoding.DecodeString(body)
	if err != nil {
		return c, fmt.Errorf("%w: cut off or altered in copying", ErrJoinCode)
	}
	if err := json.Unmarshal(b, &c); err != nil {
		return JoinCode{}, fmt.Errorf("%w: cut off or altered in copying", ErrJoinCode)
	}
	if _, err := ParseKeyHash(string(c.Root)); err != nil || c.TrustDomain == "" {
		return JoinCode{}, fmt.Errorf("%w: it pins no root", ErrJoinCode)
	}
	if c.Role != RoleNode && c.Role != RoleRCP {
		return JoinCode{}, fmt.Errorf("%w: it is for no known role", ErrJoinCode)
	}
	if c.TokenID == "" && c.Token != "" {
		return JoinCode{}, fmt.Errorf("%w: half a token", ErrJoinCode)
	}
	return c, nil
}
