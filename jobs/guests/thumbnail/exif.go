package main

import "encoding/binary"

const orientationTag = 0x0112

// orientationOf finds the orientation in Exif, which is a TIFF file without pictures
// (TIFF 6.0, section 2); 1, the usual one, if it is not there or makes no sense.
func orientationOf(tiff []byte) int {
	var order binary.ByteOrder
	switch {
	case len(tiff) < 8:
		return 1
	case string(tiff[:4]) == "II*\x00":
		order = binary.LittleEndian
	case string(tiff[:4]) == "MM\x00*":
		order = binary.BigEndian
	default:
		return 1
	}
	at := uint64(order.Uint32(tiff[4:]))
	if at+2 > uint64(len(tiff)) {
		return 1
	}
	entries := tiff[at+2:]
	for range order.Uint16(tiff[at:]) {
		if len(entries) < 12 {
			break
		}
		e := entries[:12]
		entries = entries[12:]
		const short = 3
		if order.Uint16(e) == orientationTag && order.Uint16(e[2:]) == short && order.Uint32(e[4:]) == 1 {
			if o := int(order.Uint16(e[8:])); o >= 1 && o <= 8 {
				return o
			}
		}
	}
	return 1
}

// exifOf says nothing but the orientation.
func exifOf(orientation int) []byte {
	b := []byte("MM\x00*\x00\x00\x00\x08\x00\x01")
	b = binary.BigEndian.AppendUint16(b, orientationTag)
	b = append(b, "\x00\x03\x00\x00\x00\x01"...)
	b = binary.BigEndian.AppendUint16(b, uint16(orientation))
	return append(b, 0, 0, 0, 0, 0, 0) // the rest of the value, and that there is no further directory
}

// space is the kind of colours that a profile is for (ICC.1:2022, 7.2.6), as "RGB " or
// "GRAY".
func space(profile []byte) string {
	if len(profile) < 20 {
		return ""
	}
	return string(profile[16:20])
}

func fits(space string, gray bool) bool { return space == "RGB " && !gray || space == "GRAY" && gray }
