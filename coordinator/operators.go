package coordinator

import (
	"crypto/sha256"
	"crypto/subtle"
	"net/http"
	"strings"
)

func (c *Coordinator) operatorRoutes() []route { return nil }

func (c *Coordinator) checkOperator(r *http.Request) error {
	tok, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	got := sha256.Sum256([]byte(tok))
	if !ok || subtle.ConstantTimeCompare(got[:], c.operatorHash[:]) != 1 {
		return refuse(http.StatusUnauthorized, "unauthorized", "the operator token is missing or wrong; copy the context file again from the coordinator's folder")
	}
	return nil
}
