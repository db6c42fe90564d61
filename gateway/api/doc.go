// Package api is the door of a gateway for the command line, the console and
// scripts: the types of its REST interface with their exact JSON keys, and a
// typed client. It speaks HTTP under /api/v1 over the gateway's unix socket,
// or over https with an API token; it has no knowledge of how a gateway works.
//
// Keys are snake_case and stable, times RFC 3339 in UTC, lists newest first
// where time matters. Errors are RFC 9457 problems with a machine-readable
// code: see [Problem]. Callers match codes, never text.
package api

import "time"

// Prefix begins every path of the API.
const Prefix = "/api/v1"

// List is one page of a list. Next, if not empty, asks for the following page
// as the cursor parameter.
type List[T any] struct {
	Items []T    `json:"items"`
	Next  string `json:"next,omitempty"`
}

// Page selects one page. Limit 0 asks for the server's default.
type Page struct {
	Cursor string
	Limit  int
}

// MaxPage is the largest page that a gateway hands out.
const MaxPage = 1000

// Role says what a caller may do. Each of the first three may do what the one
// before it may; the certificate officer decides on certificates and reads.
type Role string

// The roles of callers.
const (
	RoleViewer             Role = "viewer"
	RoleOperator           Role = "operator"
	RoleAdmin              Role = "admin"
	RoleCertificateOfficer Role = "certificate-officer"
)

// Roles lists all of them.
var Roles = []Role{RoleViewer, RoleOperator, RoleAdmin, RoleCertificateOfficer}

// About describes the gateway that answers.
type About struct {
	Version      string    `json:"version"`
	ID           string    `json:"id"`
	TrustDomain  string    `json:"trust_domain"`
	Installation string    `json:"installation"`
	Generation   int64     `json:"generation"`
	Started      time.Time `json:"started"`
	Caller       string    `json:"caller"` // who the gateway thinks is asking
	Role         Role      `json:"role"`   // and what the caller may do
}
