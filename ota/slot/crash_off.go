//go:build !crashpoints

package slot

// CrashPoint marks a moment at which the power may go. See crash_on.go.
func CrashPoint(string) {}
