package hw

import (
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// CHECK POWER MODE asks an ATA disk whether it spins, and is defined not to
// change that (ACS-3, 7.2). It goes through the kernel's SCSI layer as ATA
// PASS-THROUGH (16) (SAT-3, 12.2.2.3); the answer comes back as sense data.
const (
	ataPassThrough16  = 0x85
	ataCheckPowerMode = 0xe5
	ataNonData        = 3 << 1   // protocol field
	ataCheckCondition = 1 << 5   // return the registers as sense data
	sgIO              = 0x2285   // <scsi/sg.h>
	sgTimeout         = 400      // milliseconds
	maxSense          = 32       // bytes
	senseDescriptor   = 0x72     // current error, descriptor format
	senseFixed        = 0x70     // current error, fixed format
	passThroughInfo   = 0x1d     // additional sense qualifier: ATA PASS-THROUGH INFORMATION AVAILABLE
	ataStatusReturn   = 0x09     // descriptor type
	ataReady          = 1 << 6   // status register: DRDY
	ataFailed         = 0b100001 // status register: ERR or DF
)

// sgHeader is sg_io_hdr of <scsi/sg.h>.
type sgHeader struct {
	interfaceID  int32
	direction    int32
	cmdLen       uint8
	senseLen     uint8
	iovecCount   uint16
	transferLen  uint32
	transfer     unsafe.Pointer
	cmd          unsafe.Pointer
	sense        unsafe.Pointer
	timeout      uint32
	flags        uint32
	packID       int32
	_            unsafe.Pointer
	status       uint8
	maskedStatus uint8
	msgStatus    uint8
	senseWritten uint8
	hostStatus   uint16
	driverStatus uint16
	residual     int32
	duration     uint32
	info         uint32
}

var errNoPowerMode = errors.New("it did not answer CHECK POWER MODE")

// ataSpinning asks a disk whether its platters turn.
func ataSpinning(node string) (bool, error) {
	fd, err := unix.Open(node, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, fmt.Errorf("open %s: %w", node, err)
	}
	defer unix.Close(fd)
	cmd := [16]byte{0: ataPassThrough16, 1: ataNonData, 2: ataCheckCondition, 14: ataCheckPowerMode}
	var sense [maxSense]byte
	h := sgHeader{
		interfaceID: 'S', direction: -1, // SG_DXFER_NONE
		cmdLen: uint8(len(cmd)), cmd: unsafe.Pointer(&cmd[0]),
		senseLen: uint8(len(sense)), sense: unsafe.Pointer(&sense[0]),
		timeout: sgTimeout,
	}
	var pin runtime.Pinner
	defer pin.Unpin()
	pin.Pin(&cmd[0])
	pin.Pin(&sense[0])
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), sgIO, uintptr(unsafe.Pointer(&h))); errno != 0 {
		return false, fmt.Errorf("ask %s: %w", node, errno)
	}
	return spinningFromSense(sense[:min(int(h.senseWritten), len(sense))])
}

// spinningFromSense reads the count register out of sense data, which is either
// in descriptor format (Linux since 2.6) or in fixed format (Linux since 6.11,
// if the disk is set so). Anything else is an error, so that a disk is taken for
// spinning only if it said so.
func spinningFromSense(s []byte) (bool, error) {
	var status, count byte
	switch {
	case len(s) >= 22 && s[0]&0x7f == senseDescriptor && s[2] == 0 && s[3] == passThroughInfo &&
		s[8] == ataStatusReturn && s[9] >= 12:
		count, status = s[13], s[21]
	case len(s) >= 14 && s[0]&0x7f == senseFixed && s[12] == 0 && s[13] == passThroughInfo:
		count, status = s[6], s[4]
	default:
		return false, errNoPowerMode
	}
	if status&ataReady == 0 || status&ataFailed != 0 {
		return false, errNoPowerMode
	}
	switch count {
	case 0xff, 0x80, 0x81, 0x82, 0x83: // active or idle, idle, idle_a to idle_c
		return true, nil
	case 0x00, 0x01: // standby_z, standby_y
		return false, nil
	}
	return false, fmt.Errorf("it answered CHECK POWER MODE with %#02x", count)
}
