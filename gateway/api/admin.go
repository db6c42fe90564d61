package api

import (
	"time"

	"sallyport/internal/wire"
)

// CreateToken asks for an API token.
type CreateToken struct {
	Name string        `json:"name,omitempty"`
	Role Role          `json:"role"`
	TTL  wire.Duration `json:"ttl"`
}

// Token is one line of `token list`.
type Token struct {
	ID        string     `json:"id"`
	Name      string     `json:"name"`
	Role      Role       `json:"role"`
	State     string     `json:"state"` // valid, expired, revoked
	Created   time.Time  `json:"created"`
	Expires   time.Time  `json:"expires"`
	LastUsed  *time.Time `json:"last_used"`
	CreatedBy string     `json:"created_by"`
}

// CreatedToken carries the secret, which is shown this once.
type CreatedToken struct {
	Token
	Secret string `json:"token"`
}

// AuditEntry is one line of `audit list`.
type AuditEntry struct {
	Pos    int64     `json:"pos"`
	Time   time.Time `json:"time"`
	Who    string    `json:"who"`
	From   string    `json:"from"` // unix socket, or the remote address
	What   string    `json:"what"` // node.tag, request.grant, …
	Object string    `json:"object"`
	Result string    `json:"result"` // ok, refused, failed
	Detail string    `json:"detail"`
}

// AuditQuery filters the audit log.
type AuditQuery struct {
	Who   string
	What  string
	Since time.Time
	Page
}
